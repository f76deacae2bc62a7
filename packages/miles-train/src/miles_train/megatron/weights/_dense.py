"""The rows that decoders with grouped-query attention share: the Llama line, and with experts Qwen3-MoE and GLM-4.5."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from miles_train.megatron.dense_config import DenseConfig
from miles_train.megatron.weights.table import GroupedQKV, Row, Stacked, WeightTable

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def dense_table(config: DenseConfig) -> WeightTable:
    """Rows of a decoder whose layers all have a gated MLP."""
    mlp = gated_mlp_rows(
        _HF + "mlp.", _MEGATRON + "mlp.", config.hidden_size, config.intermediate_size, bias=config.mlp_bias
    )
    return decoder_table(config, [*attention_rows(config), *mlp])


def decoder_table(
    config: DenseConfig,
    layers: Sequence[Row],
    outside: tuple[str, ...] = (),
    tied: Mapping[str, str] | None = None,
) -> WeightTable:
    """A table of embedding, norms and head around the rows of attention and MLP.

    Args:
        config: of the decoder.
        layers: what each layer has beside its two norms.
        outside: see `WeightTable`.
        tied: what repeats another tensor beside a tied output head; see `WeightTable`.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    embedding, tied = EMBEDDING, dict(tied or {})
    rows = (
        Row((embedding,), ((vocab, hidden),), "embedding.word_embeddings.weight", shard_dim=0, padded=True),
        Row(("model.norm.weight",), ((hidden,),), "decoder.final_layernorm.weight"),
        *norm_rows(config),
        *layers,
    )
    if config.tied:
        return WeightTable(rows, config.num_layers, {HEAD: embedding, **tied}, outside)
    head = Row((HEAD,), ((vocab, hidden),), "output_layer.weight", shard_dim=0, padded=True)
    return WeightTable((*rows, head), config.num_layers, tied, outside)


def norm_rows(config: DenseConfig, hf: str = _HF, megatron: str = _MEGATRON) -> list[Row]:
    """Rows of a layer's norms, by the prefixes of their names."""
    names = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
    return [Row((f"{hf}{a}.weight",), ((config.hidden_size,),), f"{megatron}{b}.weight") for a, b in names.items()]


def attention_rows(config: DenseConfig, hf: str = _HF, megatron: str = _MEGATRON) -> list[Row]:
    """Rows of grouped-query attention, by the prefixes of a layer's names."""
    hidden, heads, groups, dim = config.hidden_size, config.num_heads, config.num_groups, config.head_dim
    fusion = GroupedQKV(heads, groups, dim)
    qkv = tuple(hf + f"self_attn.{part}_proj" for part in "qkv")
    output = hf + "self_attn.o_proj"
    sizes = (heads * dim, groups * dim, groups * dim)
    megatron += "self_attention."
    rows = [
        Row(
            _suffixed(qkv, "weight"),
            tuple((size, hidden) for size in sizes),
            megatron + "linear_qkv.weight",
            fusion,
            shard_dim=0,
        ),
        Row((output + ".weight",), ((hidden, heads * dim),), megatron + "linear_proj.weight", shard_dim=1),
    ]
    if config.qkv_bias:
        biases = tuple((size,) for size in sizes)
        rows.append(Row(_suffixed(qkv, "bias"), biases, megatron + "linear_qkv.bias", fusion, shard_dim=0))
    if config.output_bias:
        rows.append(Row((output + ".bias",), ((hidden,),), megatron + "linear_proj.bias"))
    if config.qk_norm:
        rows += [
            Row((hf + f"self_attn.{part}_norm.weight",), ((dim,),), megatron + f"{part}_layernorm.weight")
            for part in "qk"
        ]
    return rows


def gated_mlp_rows(
    hf: str,
    megatron: str,
    hidden: int,
    width: int,
    *,
    bias: bool = False,
    layers: tuple[int, ...] | None = None,
    num_experts: int = 0,
) -> list[Row]:
    """Rows of a gated MLP: `gate_proj`, `up_proj` and `down_proj` after the prefix `hf`.

    Args:
        hf: prefix of Hugging Face's names.
        megatron: prefix of Megatron's.
        hidden: width of the residual stream.
        width: of the MLP.
        bias: whether all three have biases.
        layers: which layers have it; None for all of them.
        num_experts: how many experts a prefix with `{expert}` stands for.
    """
    gate_up, down = (hf + "gate_proj", hf + "up_proj"), hf + "down_proj"
    rows = [
        Row(_suffixed(gate_up, "weight"), ((width, hidden),) * 2, megatron + "linear_fc1.weight", Stacked(2), 0),
        Row((down + ".weight",), ((hidden, width),), megatron + "linear_fc2.weight", shard_dim=1),
    ]
    if bias:
        rows += [
            Row(_suffixed(gate_up, "bias"), ((width,),) * 2, megatron + "linear_fc1.bias", Stacked(2), 0),
            Row((down + ".bias",), ((hidden,),), megatron + "linear_fc2.bias"),
        ]
    return [replace(row, layers=layers, num_experts=num_experts) for row in rows]


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}.{suffix}" for name in names)
