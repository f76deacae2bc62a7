"""What config.json says of a dense decoder of the Llama line, in one checked shape.

The weight table and the layer spec of such a family both start here. Values that would change the arithmetic in a way
this package does not compute are refused: a model that only almost matches is worse than none. Keys that change
nothing here: `attention_dropout` (dropout is off), `initializer_range` (weights are read), `use_cache`,
`pretraining_tp`, ids of the tokens that begin and end, `output_router_logits` and `router_aux_loss_coef` (there are no
auxiliary losses).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.rope import Rope, read_rope


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A decoder with grouped-query attention, RMSNorm, rotary embedding and a SiLU-gated MLP.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads.
        num_groups: key-value heads.
        head_dim: channels of one head.
        intermediate_size: width of the MLP.
        vocab_size: rows of the embedding.
        norm_eps: epsilon of every RMSNorm.
        tied: whether the output head is the embedding.
        qkv_bias: whether the query, key and value projections have biases.
        output_bias: whether attention's output projection has one.
        mlp_bias: whether gate, up and down have biases.
        qk_norm: whether each query and key head passes an RMSNorm of its own.
        max_positions: longest sequence in tokens.
        rope: the rotary embedding.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_groups: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    rope: Rope


def read_dense_config(
    config: Mapping[str, Any],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    partial: float | None = None,
) -> DenseConfig:
    """Take what counts from config.json.

    Args:
        config: config.json, in the spelling of transformers 4 or 5, with the family's defaults for what it omits.
        qkv_bias: see `DenseConfig`, as the next three: what they follow from depends on the architecture.
        output_bias: as above.
        mlp_bias: as above.
        qk_norm: as above.
        partial: the architecture's default share of rotated channels; None where attention rotates all (`read_rope`).

    Raises:
        InputError: a value whose arithmetic is not implemented, or sizes that do not divide.
        KeyError: a needed key is missing.
    """
    check_only(config, "hidden_act", "silu", "swish")
    heads = config["num_attention_heads"]
    groups = config["num_key_value_heads"] or heads
    if heads % groups:
        raise InputError(
            "num_key_value_heads",
            groups,
            f"must divide num_attention_heads = {heads}",
            "Save the model's config again.",
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return DenseConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        tied=bool(config["tie_word_embeddings"]),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        max_positions=config["max_position_embeddings"],
        rope=read_rope(config, head_dim, partial=partial),
    )


def check_window(config: Mapping[str, Any]) -> None:
    """Refuse layers that attend to a window only; the switches for it may stand where no layer obeys them.

    Raises:
        InputError: a layer's attention has a window.
    """
    kinds = config.get("layer_types")
    if kinds is not None:
        windowed = [number for number, kind in enumerate(kinds) if kind != "full_attention"]
        setting, value = "layer_types", kinds
    else:
        first = config.get("max_window_layers", 0)
        on = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
        windowed = list(range(first, config["num_hidden_layers"])) if on else []
        setting, value = "use_sliding_window", config.get("use_sliding_window")
    if windowed:
        raise InputError(
            f"{setting} of {_name(config)}",
            value,
            f"only full attention is computed here, and {len(windowed)} layers are not to have it",
            "Train a model without sliding windows.",
        )


def check_only(config: Mapping[str, Any], key: str, *allowed: object) -> None:
    """Refuse a value whose arithmetic is not implemented; a missing key counts as the first of those allowed.

    Raises:
        InputError: the value is none of `allowed`.
    """
    if config.get(key, allowed[0]) not in allowed:
        raise InputError(
            f"{key} of {_name(config)}",
            config[key],
            f"only {' or '.join(map(repr, allowed))} is computed here",
            "Train a model without it.",
        )


def _name(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or ["the model"])[0]
