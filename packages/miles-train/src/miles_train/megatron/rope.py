"""Rotary position embedding as config.json describes it, for every family.

A `Rope` gives the angle per token of each pair of channels, and the factor on cosine and sine. How channels pair up
(first half with second half, or neighbours) belongs to the family. Formulas and defaults are those of
transformers/modeling_rope_utils.py (5.12), whose order of operations is kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from miles_core.errors import InputError

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the wavelengths.
        dim: channels of a head that are rotated, the first ones and an even number; the others pass unchanged.
        kind: one of `KINDS`.
        factor: how far the context is stretched; 1 for "default".
        attention_factor: on cosine and sine, so squared on the scores ("yarn" and "longrope"; 1 otherwise).
        original_max: the context length before stretching, in tokens ("yarn", "longrope" and "llama3").
        low_freq_factor: "llama3" only: wavelengths above original_max / low_freq_factor are stretched in full,
        high_freq_factor: those below original_max / high_freq_factor not at all.
        beta_fast: "yarn" only: channels that turn more often than this within original_max are not stretched,
        beta_slow: those that turn less often in full.
        truncate: "yarn" only: whether these two bounds are rounded to whole channels.
        short_factor: "longrope" only: how far each pair is stretched, dim / 2 values.
        rotated: "proportional" only: channels that turn at all; the others of `dim` have angle 0.
        share: the channels that the head's share makes, where they are odd and `dim` is one more; 0 otherwise. The
            wavelengths go by them.
        max_length: longest sequence, in tokens, for which the frequencies hold; None for any. Beyond it "dynamic" and
            "longrope" take others, for the whole sequence.
    """

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    attention_factor: float = 1.0
    original_max: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    rotated: int = 0
    share: int = 0
    max_length: int | None = None

    def inverse_frequencies(self) -> Tensor:
        """Angle per token of each pair of channels, float32 [dim / 2].

        Sources: Su et al. 2021 (arXiv:2104.09864); "linear": Chen et al. 2023 (arXiv:2306.15595); "yarn": Peng et al.
        2023 (arXiv:2309.00071); "longrope": Ding et al. 2024 (arXiv:2402.13753); the rest: `_compute_*_parameters` of
        the file above.
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64, device="cpu").float() / (self.share or self.dim)
        wavelengths = self._base() ** exponents
        match self.kind:
            case "linear":
                return 1.0 / wavelengths / self.factor
            case "yarn":
                return self._yarn(wavelengths)
            case "longrope":
                return 1.0 / (torch.tensor(self.short_factor, dtype=torch.float32) * wavelengths)
            case "llama3":
                return self._llama3(1.0 / wavelengths)
            case "proportional":
                turning = torch.arange(self.dim // 2) < self.rotated // 2
                return torch.where(turning, 1.0 / wavelengths, 0.0) / self.factor
        return 1.0 / wavelengths

    def _base(self) -> float:
        if self.kind != "dynamic":
            return self.theta
        # Up to max_length the context is not stretched; the expression is 1 but for rounding, which is kept.
        dim = self.share or self.dim
        return self.theta * (self.factor * 1.0 - (self.factor - 1)) ** (dim / (dim - 2))

    def _llama3(self, inverse: Tensor) -> Tensor:
        wavelength = 2 * math.pi / inverse
        longest, shortest = self.original_max / self.low_freq_factor, self.original_max / self.high_freq_factor
        smooth = (self.original_max / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        stretched = torch.where(wavelength > longest, inverse / self.factor, inverse)
        between = ~(wavelength < shortest) & ~(wavelength > longest)
        blended = (1 - smooth) * stretched / self.factor + smooth * stretched
        return torch.where(between, blended, stretched)

    def _yarn(self, wavelengths: Tensor) -> Tensor:
        def channel(turns: float) -> float:
            """Which pair turns that often within the original context."""
            return self.dim * math.log(self.original_max / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    partial: float | None = None,
    layer_type: str | None = None,
    theta: float = 10000.0,
) -> Rope:
    """Take the rotary embedding from config.json.

    Transformers 5 writes `rope_parameters`; 4 writes `rope_theta` beside `rope_scaling`, which may be null, and
    `partial_rotary_factor` beside both. Where both spellings are there, `rope_scaling` counts, as in transformers.

    Args:
        config: config.json, or its part for the text.
        head_dim: channels of a head that the embedding may rotate.
        partial: the family's share of rotated channels where the config names none; None for families whose
            attention always rotates all of them.
        layer_type: which entry to take where the config has one per layer type; None where the family has one for all.
        theta: the family's `rope_theta` where the config names none.

    Raises:
        InputError: an unknown kind, a value that its kind needs and the config lacks, or a share of rotated channels
            that the family's attention cannot compute.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(name) or {}
    nested = layer_type is not None and layer_type in values
    if nested:
        values, name = values[layer_type], f"{name}.{layer_type}"
    elif values and all(isinstance(value, Mapping) for value in values.values()):
        raise _error(name, sorted(values), "must be one embedding for all layers of this architecture")
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in KINDS:
        raise _error(f"{name}.rope_type", kind, f"must be one of {', '.join(KINDS)}")
    for key in _NEEDED.get(kind, ()):
        if key not in values:
            raise _error(f"{name}.{key}", None, f"is needed for rope_type {kind!r}")
    base = values.get("rope_theta", config.get("rope_theta"))
    share = _read_share(config, values, kind, partial)
    channels = head_dim if kind == "proportional" else int(head_dim * share)
    dim = channels + channels % 2
    if not 0 < dim <= head_dim or (channels % 2 and kind == "yarn"):
        raise _error("head_dim", head_dim, f"leaves {channels} channels to rotate, which do not make pairs")
    rotated = 2 * int(share * head_dim // 2) if kind == "proportional" else 0
    made = Rope(
        theta if base is None else float(base), dim, kind, rotated=rotated, share=channels if channels % 2 else 0
    )
    return made if kind == "default" else _read_scaling(made, values, name, config, nested)


def _read_share(config: Mapping[str, Any], values: Mapping[str, Any], kind: str, partial: float | None) -> float:
    """The share of rotated channels.

    Transformers keeps it in two places. The one inside the embedding's values counts for "default"; for every other
    kind the one beside them (which it fills in with the family's own) has overwritten it by the time it is read.
    """
    inside, beside = values.get("partial_rotary_factor"), config.get("partial_rotary_factor", partial)
    first, second = (inside, beside) if kind == "default" else (beside, inside)
    share = second if first is None else first
    if share is None:
        return 1.0
    if partial is None and share != 1 and kind != "proportional":
        raise _error("partial_rotary_factor", share, "must be 1: this architecture's attention rotates all channels")
    return float(share)


def _read_scaling(rope: Rope, values: Mapping[str, Any], name: str, config: Mapping[str, Any], nested: bool) -> Rope:
    """The embedding with what its kind adds."""
    longest = config["max_position_embeddings"]
    original = None if nested else config.get("original_max_position_embeddings")
    original = original or values.get("original_max_position_embeddings") or longest
    factor = values.get("factor")
    if factor is None:
        factor = longest / original if rope.kind in {"yarn", "longrope"} else 1.0
    made: dict[str, Any] = {"factor": float(factor), "original_max": int(original)}
    match rope.kind:
        case "dynamic":
            made |= {"max_length": longest}
        case "llama3":
            made |= {key: float(values[key]) for key in ("low_freq_factor", "high_freq_factor")}
        case "yarn":
            made |= {
                "beta_fast": float(values.get("beta_fast") or 32),
                "beta_slow": float(values.get("beta_slow") or 1),
                "truncate": bool(values.get("truncate", True)),
                "attention_factor": _yarn_attention_factor(values, factor),
            }
        case "longrope":
            short = tuple(map(float, values["short_factor"]))
            if len(short) != rope.dim // 2:
                raise _error(f"{name}.short_factor", f"{len(short)} values", f"must be {rope.dim // 2}, one a pair")
            made |= {
                "short_factor": short,
                "max_length": int(original),
                "attention_factor": _longrope_attention_factor(values, factor, original),
            }
    return replace(rope, **made)


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    def magnitude(scale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    if values.get("mscale") and values.get("mscale_all_dim"):
        return magnitude(values["mscale"]) / magnitude(values["mscale_all_dim"])
    return magnitude()


def _longrope_attention_factor(values: Mapping[str, Any], factor: float, original: int) -> float:
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def _error(setting: str, value: object, rule: str) -> InputError:
    return InputError(f"{setting} in config.json", value, rule, "Use the config that the model came with.")
