"""The rows of a mixture of experts, for every family that has one."""

from dataclasses import dataclass
from functools import partial

from miles_train.megatron.moe_config import MoEConfig, MoEDecoder
from miles_train.megatron.weights._dense import (
    EMBEDDING,
    HEAD,
    attention_rows,
    decoder_table,
    gated_mlp_rows,
    norm_rows,
)
from miles_train.megatron.weights._more import more_rows, more_ties
from miles_train.megatron.weights.table import Row, Stacked, WeightTable


@dataclass(frozen=True, slots=True)
class MoENames:
    """How a family calls the block's tensors, each after `prefix`.

    Attributes:
        prefix: of the block, with `{layer}` where it stands for several.
        router: the router's weight.
        bias: the router's bias per expert.
        experts: prefix of the routed experts.
        shared: prefix of the shared experts.
        shared_gate: weight of the gate on the shared experts.
        stacked: whether one tensor holds all experts: `gate_up_proj` [experts, 2 * size, hidden] and `down_proj`
            [experts, hidden, size]; otherwise each expert has three tensors, `{expert}.gate_proj.weight` and so on.
    """

    prefix: str = "model.layers.{layer}.mlp."
    router: str = "gate.weight"
    bias: str = "gate.e_score_correction_bias"
    experts: str = "experts."
    shared: str = "shared_experts."
    shared_gate: str = "shared_expert_gate.weight"
    stacked: bool = False


def moe_decoder_table(config: MoEDecoder, *, predicts_more: bool = False) -> WeightTable:
    """Table of a decoder with grouped-query attention and experts.

    Args:
        config: of the decoder.
        predicts_more: whether layers for multi-token prediction are trained; else they pass through export unchanged.

    Raises:
        InputError: they are to be trained, and the model has none.
    """
    dense, hf, megatron = config.dense, "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
    rows = attention_rows(dense)
    rows += gated_mlp_rows(hf, megatron, dense.hidden_size, dense.intermediate_size, layers=config.dense_layers)
    if config.moe:
        rows += moe_rows(config.moe, dense.hidden_size, config.layers)
    if not predicts_more:
        return decoder_table(dense, rows, tuple(f"model.layers.{layer}.*" for layer in config.more_layers))
    rows += more_rows(config.more_layers, dense.hidden_size, partial(_more_layer_rows, config))
    return decoder_table(dense, rows, tied=more_ties(config.more_layers, EMBEDDING, EMBEDDING if dense.tied else HEAD))


def _more_layer_rows(config: MoEDecoder, hf: str, megatron: str) -> list[Row]:
    """Rows of a decoder layer like the last one."""
    dense, mlp = config.dense, (hf + "mlp.", megatron + "mlp.")
    rows = norm_rows(dense, hf, megatron) + attention_rows(dense, hf, megatron)
    if config.moe and dense.num_layers - 1 in config.layers:
        return rows + moe_rows(config.moe, dense.hidden_size, None, MoENames(prefix=mlp[0]), mlp[1])
    return rows + gated_mlp_rows(*mlp, dense.hidden_size, dense.intermediate_size)


def moe_rows(
    config: MoEConfig,
    hidden: int,
    layers: tuple[int, ...] | None = None,
    names: MoENames | None = None,
    megatron: str = "decoder.layers.{layer}.mlp.",
) -> list[Row]:
    """Rows of the block.

    Args:
        config: of the experts.
        hidden: width of the residual stream.
        layers: which layers have such a block; None for all of them.
        names: Hugging Face's; None for those of DeepSeek-V3.
        megatron: prefix of Megatron's names.
    """
    names = names or MoENames()
    router = names.prefix + names.router
    rows = [Row((router,), ((config.num_experts, hidden),), megatron + "router.weight", layers=layers)]
    if config.has_bias:
        bias = names.prefix + names.bias
        rows.append(Row((bias,), ((config.num_experts,),), megatron + "router.expert_bias", layers=layers, fp32=True))
    rows += _expert_rows(config, hidden, layers, names, megatron + "experts.local_experts.{expert}.")
    if config.shared_size:
        rows += gated_mlp_rows(
            names.prefix + names.shared, megatron + "shared_experts.", hidden, config.shared_size, layers=layers
        )
    if config.shared_gate:
        gate = names.prefix + names.shared_gate
        rows.append(Row((gate,), ((1, hidden),), megatron + "shared_experts.gate_weight", layers=layers))
    return rows


def _expert_rows(
    config: MoEConfig, hidden: int, layers: tuple[int, ...] | None, names: MoENames, megatron: str
) -> list[Row]:
    prefix, size = names.prefix + names.experts, config.expert_size
    if not names.stacked:
        return gated_mlp_rows(
            prefix + "{expert}.", megatron, hidden, size, layers=layers, num_experts=config.num_experts
        )
    return [
        Row(
            (prefix + "gate_up_proj",) * 2,
            ((size, hidden),) * 2,
            megatron + "linear_fc1.weight",
            Stacked(2),
            shard_dim=0,
            layers=layers,
            num_experts=config.num_experts,
            starts=(0, size),
        ),
        Row(
            (prefix + "down_proj",),
            ((hidden, size),),
            megatron + "linear_fc2.weight",
            shard_dim=1,
            layers=layers,
            num_experts=config.num_experts,
        ),
    ]
