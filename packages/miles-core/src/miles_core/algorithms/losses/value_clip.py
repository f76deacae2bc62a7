"""A critic's loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class ValueClip:
    """PPO's clipped squared error of values.

    Per token:

        loss = 0.5 * max((values - returns)^2, (clip(values, old_values - clip, old_values + clip) - returns)^2)

    Source: PPO's reference implementation (github.com/openai/baselines); Huang et al. 2022, "The 37 implementation
    details of PPO", detail 9.

    Attributes:
        clip: how far a value may move in a step and still count; > 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values", "old_values", "returns"})

    clip: float = 0.2

    def __post_init__(self) -> None:
        """Refuse a bound that lets nothing move."""
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} must be > 0: values could not move")

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metric `value_clip_fraction`, tokens stopped by the clip [T]."""
        values, old, returns = (inputs.column(name) for name in ("values", "old_values", "returns"))
        clipped = torch.clamp(values, old - self.clip, old + self.clip)
        free, bound = (values - returns) ** 2, (clipped - returns) ** 2
        return 0.5 * torch.maximum(free, bound), {"value_clip_fraction": (bound > free).detach().float()}
