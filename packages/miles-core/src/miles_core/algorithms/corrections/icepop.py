"""IcePop: a mask with two sides."""

from dataclasses import dataclass

from miles_core.algorithms.corrections.ratio import Level, check_bounds, rollout_ratio
from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class IcePop:
    """Double-sided masking: weight = ratio where lower <= ratio <= upper, else 0.

    The ratio is that of `rollout_ratio`, by default of each token, which is out when trainer and engine disagree about
    it in either direction.

    Source: Ling Team 2025, "Every step evolves: scaling reinforcement learning for trillion-scale thinking model"
    (arXiv:2510.18855), eq. 3; bounds of its blog post "Small leak can sink a great ship".

    Attributes:
        level: "token", "sequence" or "geometric".
        lower: least ratio that counts, in [0, 1].
        upper: largest ratio that counts, >= 1.
    """

    level: Level = "token"
    lower: float = 0.5
    upper: float = 5.0

    def __post_init__(self) -> None:
        """Refuse bounds without meaning."""
        check_bounds(self.level, self.lower, self.upper)

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return weights [T]; metrics `icepop_<level>_weight` and `icepop_<level>_masked`, tokens of weight 0 [T]."""
        ratio = rollout_ratio(inputs, self.level)
        inside = ((ratio >= self.lower) & (ratio <= self.upper)).to(ratio.dtype)
        weight = ratio * inside
        return weight, {f"icepop_{self.level}_weight": weight, f"icepop_{self.level}_masked": 1 - inside}
