"""CISPO: clip the weight, never the token."""

from dataclasses import dataclass

import torch

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class CISPO:
    """REINFORCE with a clipped importance weight, through which no gradient goes; every token keeps its own.

    With r = exp(logprobs - old_logprobs) and advantage A, per token:

        loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) * A * logprobs

    Source: MiniMax-M1 (arXiv:2506.13585), eq. 4 and 5, without a bound from below. That clip_high = 4 does well over
    orders of magnitude of compute is from ScaleRL (arXiv:2510.13786).

    Attributes:
        clip_low: how far below 1 the weight may fall; 1 and more bound nothing.
        clip_high: how far above 1 it may rise; > 0.
    """

    clip_low: float = 1.0
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        """Refuse bounds that exclude a weight of 1."""
        for name, value in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be > 0: a weight of 1 must lie between the bounds")

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metrics `clip_fraction_low`, `clip_fraction_high`, `ratio` [T]."""
        ratio = torch.exp(inputs.log_ratio().detach())
        low, high = 1 - self.clip_low, 1 + self.clip_high
        loss = -ratio.clamp(low, high) * inputs.masked(inputs.advantages) * inputs.masked(inputs.logprobs)
        return loss, {
            "clip_fraction_low": (ratio < low).float(),
            "clip_fraction_high": (ratio > high).float(),
            "ratio": ratio,
        }
