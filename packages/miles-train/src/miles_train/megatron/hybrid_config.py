"""What config.json says of a decoder that mixes gated DeltaNet with gated attention, in one checked shape.

Qwen3-Next, Qwen3.5 and Qwen3.6, dense or with experts. Defaults are those of their classes in transformers 5.12.
Values that would change the arithmetic in a way that this package does not compute are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.dense_config import DenseConfig, check_only, read_dense_config
from miles_train.megatron.moe_config import MoEConfig

# transformers/models/qwen3_next/configuration_qwen3_next.py, and the same in qwen3_5 and qwen3_5_moe.
_DEFAULTS: Mapping[str, Any] = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_ROTATED = 0.25
# What the published config.json says besides, of which transformers' classes know no alternative.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),
}


@dataclass(frozen=True, slots=True)
class DeltaNetConfig:
    """Gated DeltaNet.

    Attributes:
        key_heads: heads of queries and keys.
        value_heads: heads of values, a multiple of key_heads: neighbours share a query and a key.
        key_dim: channels of a query or key.
        value_dim: channels of a value.
        conv_width: tokens that the convolution over queries, keys and values sees, the token itself among them.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    def __post_init__(self) -> None:
        """Refuse heads that cannot be shared."""
        if self.value_heads < 1 or self.value_heads % self.key_heads:
            rule = f"must be a multiple of linear_num_key_heads = {self.key_heads}"
            raise _error("linear_num_value_heads", self.value_heads, rule)


@dataclass(frozen=True, slots=True)
class HybridConfig:
    """A decoder with DeltaNet in some layers and gated attention in the others, with or without experts.

    Every norm but DeltaNet's own has the gain 1 + weight.

    Attributes:
        dense: residual stream, attention, embedding and dense MLP.
        delta: DeltaNet.
        full_layers: layers with attention; the others have DeltaNet.
        moe: the experts; None where no layer has any.
        moe_layers: layers with experts; the others have the dense MLP.
    """

    dense: DenseConfig
    delta: DeltaNetConfig
    full_layers: tuple[int, ...]
    moe: MoEConfig | None
    moe_layers: tuple[int, ...]

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers with DeltaNet."""
        return self._without(self.full_layers)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with a dense MLP."""
        return self._without(self.moe_layers)

    def _without(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.dense.num_layers) if layer not in layers)


def read_hybrid_config(
    config: Mapping[str, Any], has_experts: Callable[[int], bool], *, normalize: bool
) -> HybridConfig:
    """Take what counts from config.json.

    Args:
        config: config.json, or its part for the text, in the spelling of transformers 4 or 5.
        has_experts: whether a layer, from 0, has experts instead of a dense MLP.
        normalize: whether the weights of a token's experts sum to 1.

    Raises:
        InputError: a value whose arithmetic is not implemented, or that cannot be.
        KeyError: a needed key is missing.
    """
    values = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    for key, allowed in _FIXED.items():
        check_only(values, key, *allowed)
    num_layers = values["num_hidden_layers"]
    moe_layers = tuple(layer for layer in range(num_layers) if has_experts(layer))
    if len(moe_layers) == num_layers:
        values.setdefault("intermediate_size", values["moe_intermediate_size"])  # of no layer
    bias = bool(values.get("attention_bias", False))
    return HybridConfig(
        dense=read_dense_config(
            _with_one_share(values), qkv_bias=bias, output_bias=bias, qk_norm=True, partial=_ROTATED
        ),
        delta=DeltaNetConfig(
            values["linear_num_key_heads"],
            values["linear_num_value_heads"],
            values["linear_key_head_dim"],
            values["linear_value_head_dim"],
            values["linear_conv_kernel_dim"],
        ),
        full_layers=_full_layers(values),
        moe=_read_moe(values, normalize) if moe_layers else None,
        moe_layers=moe_layers,
    )


def _full_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers with attention: those that `layer_types` names, or each `full_attention_interval`-th."""
    count, types = values["num_hidden_layers"], values.get("layer_types")
    if types is None:
        interval = values.get("full_attention_interval", 4)
        if interval < 1:
            raise _error("full_attention_interval", interval, "must be at least 1")
        return tuple(range(interval - 1, count, interval))
    if len(types) != count or not set(types) <= {"linear_attention", "full_attention"}:
        raise _error("layer_types", types, f"must name linear_attention or full_attention for each of {count} layers")
    return tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")


def _with_one_share(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settle which share of channels is turned, where it stands inside the rotary parameters and beside them.

    Transformers takes the one inside for the plain embedding, and the one beside for those that stretch the context.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name) or {}
    inside, beside = rope.get("partial_rotary_factor"), values.get("partial_rotary_factor")
    if inside is None or beside is None:
        return values
    plain = (rope.get("rope_type") or rope.get("type") or "default") == "default"
    share = inside if plain else beside
    return {**values, "partial_rotary_factor": share, name: {**rope, "partial_rotary_factor": share}}


def _read_moe(values: Mapping[str, Any], normalize: bool) -> MoEConfig:
    shared = values["shared_expert_intermediate_size"]
    if shared < 1:
        raise _error("shared_expert_intermediate_size", shared, "must be at least 1: these models have a shared expert")
    return MoEConfig(
        num_experts=values["num_experts"],
        top_k=values["num_experts_per_tok"],
        expert_size=values["moe_intermediate_size"],
        normalize=normalize,
        shared_size=shared,
        shared_gate=True,
    )


def _error(setting: str, value: object, rule: str) -> InputError:
    return InputError(f"{setting} in config.json", value, rule, "Use the config that the model was trained with.")
