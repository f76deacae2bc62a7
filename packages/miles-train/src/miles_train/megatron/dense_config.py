"""What config.json says of a dense decoder of the Llama line, in one checked shape.

The weight table and the layer spec of such a family both start here. Values that would change the arithmetic in a way
this package does not compute are refused: a model that only almost matches is worse than none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_core.errors import InputError


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the wavelengths.
        kind: "default", "linear" or "llama3".
        factor: how far the context is stretched; 1 for "default".
        low_freq_factor: "llama3" only, as are the next two: wavelengths above original_max / low_freq_factor are
            stretched in full,
        high_freq_factor: those below original_max / high_freq_factor not at all,
        original_max: the context length before stretching, in tokens.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max: int = 8192

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """Angle per token of each pair of channels, float32 [head_dim / 2].

        Formulas: Su et al. 2021 (arXiv:2104.09864); "linear": Chen et al. 2023 (arXiv:2306.15595); "llama3":
        transformers/modeling_rope_utils.py, `_compute_llama3_parameters`, whose order of operations is kept.
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        inverse = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return inverse / self.factor
        if self.kind == "default":
            return inverse
        wavelength = 2 * math.pi / inverse
        longest, shortest = self.original_max / self.low_freq_factor, self.original_max / self.high_freq_factor
        smooth = (self.original_max / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        stretched = torch.where(wavelength > longest, inverse / self.factor, inverse)
        between = ~(wavelength < shortest) & ~(wavelength > longest)
        blended = (1 - smooth) * stretched / self.factor + smooth * stretched
        return torch.where(between, blended, stretched)


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
        attention_bias: whether q, k, v and the output projection have biases.
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
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int
    rope: Rope


def read_dense_config(
    config: Mapping[str, Any], *, qk_norm: bool, mlp_bias: bool, head_dim: int | None = None
) -> DenseConfig:
    """Take what counts from config.json.

    Args:
        config: config.json, in the spelling of transformers 4 or 5.
        qk_norm: see `DenseConfig`; a property of the architecture.
        mlp_bias: as above.
        head_dim: the architecture's default where the config names none; None means hidden_size / heads.

    Raises:
        InputError: a value whose arithmetic is not implemented, or sizes that do not divide.
        KeyError: a needed key is missing.
    """
    _refuse(config, "hidden_act", config.get("hidden_act", "silu"), "silu")
    _refuse(config, "quantization_config", config.get("quantization_config"), None)
    _refuse(config, "use_sliding_window", config.get("use_sliding_window", False), False)
    for kind in config.get("layer_types") or ():
        _refuse(config, "layer_types", kind, "full_attention")
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise InputError(
            "num_key_value_heads",
            groups,
            f"must divide num_attention_heads = {heads}",
            "Save the model's config again.",
        )
    return DenseConfig(
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_groups=groups,
        head_dim=config.get("head_dim") or head_dim or config["hidden_size"] // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        max_positions=config["max_position_embeddings"],
        rope=_read_rope(config),
    )


def _read_rope(config: Mapping[str, Any]) -> Rope:
    """Transformers 5 writes `rope_parameters`; 4 writes `rope_theta` beside `rope_scaling`, which may be null."""
    values = {"rope_theta": config.get("rope_theta", 10000.0)}
    values |= config.get("rope_scaling") or {}
    values |= config.get("rope_parameters") or {}
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in {"default", "linear", "llama3"}:
        raise InputError(
            "rope_type",
            kind,
            'must be "default", "linear" or "llama3"',
            "Train a model with one of these rotary embeddings.",
        )
    _refuse(config, "partial_rotary_factor", values.get("partial_rotary_factor", 1.0), 1.0)
    theta = float(values["rope_theta"])
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(values["factor"]))
    return Rope(
        theta,
        kind,
        float(values["factor"]),
        float(values["low_freq_factor"]),
        float(values["high_freq_factor"]),
        int(values["original_max_position_embeddings"]),
    )


def _refuse(config: Mapping[str, Any], key: str, value: object, only: object) -> None:
    if value != only:
        raise InputError(
            f"{key} of {config.get('architectures', ['the model'])[0]}",
            value,
            f"only {only!r} is computed here",
            "Train a model without it.",
        )
