"""Masked importance sampling."""

from dataclasses import dataclass

from miles_core.algorithms.corrections.ratio import Level, check_bounds, rollout_ratio
from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class MIS:
    """Masked importance sampling: weight = ratio where lower <= ratio <= upper, else 0.

    The ratio is that of `rollout_ratio`. By default whole samples are left out when the engine gave them less than half
    the probability that the trainer does. `weigh=False` only masks: weight 1 inside the bounds (rejection sampling), to
    be put beside another correction that weighs.

    Source: Liu, Li et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference
    mismatch".

    Attributes:
        level: "token", "sequence" or "geometric".
        lower: least ratio that counts, in [0, 1].
        upper: largest ratio that counts, >= 1.
        weigh: multiply by the ratio inside the bounds.
    """

    level: Level = "sequence"
    lower: float = 0.0
    upper: float = 2.0
    weigh: bool = True

    def __post_init__(self) -> None:
        """Refuse bounds without meaning."""
        check_bounds(self.level, self.lower, self.upper)

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return weights [T]; metrics `mis_<level>_weight` and `mis_<level>_masked`, tokens of weight 0 [T]."""
        ratio = rollout_ratio(inputs, self.level)
        inside = ((ratio >= self.lower) & (ratio <= self.upper)).to(ratio.dtype)
        weight = ratio * inside if self.weigh else inside
        return weight, {f"mis_{self.level}_weight": weight, f"mis_{self.level}_masked": 1 - inside}
