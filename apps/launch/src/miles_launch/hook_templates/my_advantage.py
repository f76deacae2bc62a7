"""How much better than expected each sample was.

Save as my_advantage.py, and say in the recipe

    [algorithm]
    advantage = { name = "my_advantage:against_the_median", scale = 1.0 }
"""

import numpy as np

from miles_core.algorithms import AdvantageInputs
from miles_core.types import Floats


def against_the_median(inputs: AdvantageInputs, *, scale: float = 1.0) -> Floats:
    """A_i = scale * (r_i - median of its group), one per sample [N]. One per token [T] would do as well."""
    advantages = np.zeros(len(inputs.rewards), np.float32)
    for group in np.unique(inputs.group_index):
        members = inputs.group_index == group
        advantages[members] = scale * (inputs.totals[members] - np.median(inputs.totals[members]))
    return advantages
