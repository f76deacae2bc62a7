"""Sample filters that come with Miles."""

import numpy as np

from miles_core.types import Group


def zero_variance(group: Group) -> str | None:
    """Drop a group whose rewards are all equal: GRPO and its kin learn nothing from it (DAPO, arXiv:2503.14476)."""
    return "zero variance" if np.ptp(group.rewards) == 0 else None
