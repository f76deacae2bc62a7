"""Truncated importance sampling."""

from dataclasses import dataclass

from miles_core.algorithms.corrections.ratio import Level, check_bounds, rollout_ratio
from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class TIS:
    """Truncated importance sampling: weight = clip(ratio, lower, upper), with the ratio of `rollout_ratio`.

    Sources: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; truncation:
    Ionides 2008, "Truncated importance sampling".

    Attributes:
        level: "token", "sequence" or "geometric".
        lower: least weight, in [0, 1].
        upper: largest weight, >= 1.
    """

    level: Level = "token"
    lower: float = 0.0
    upper: float = 2.0

    def __post_init__(self) -> None:
        """Refuse bounds without meaning."""
        check_bounds(self.level, self.lower, self.upper)

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return weights [T]; metrics `tis_<level>_weight` and `tis_<level>_clipped`, tokens outside the bounds [T]."""
        ratio = rollout_ratio(inputs, self.level)
        weight = ratio.clamp(self.lower, self.upper)
        clipped = (ratio != weight).float()
        return weight, {f"tis_{self.level}_weight": weight, f"tis_{self.level}_clipped": clipped}
