"""GRPO."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.algorithms.advantages.shapes import EPS, group_mean, group_size, group_std
from miles_core.types import Floats


def grpo(inputs: AdvantageInputs, *, normalize_std: bool = True) -> Floats:
    """Group-relative advantages: A_i = (r_i - mean(r)) / (std(r) + EPS), the mean and std over the group.

    A group of equal rewards gives zeros. The standard deviation is the unbiased one (n - 1), as torch.std; in a group
    of one there is nothing to compare with: 0.

    Source: DeepSeekMath (arXiv:2402.03300), section 4.1.2.

    Args:
        inputs: rewards of the groups.
        normalize_std: divide by the standard deviation of the group. Without, see `dr_grpo`.

    Returns:
        Advantages, float32 [N].
    """
    rewards, group_index = inputs.totals, inputs.group_index
    centred = rewards - group_mean(rewards, group_index)
    if normalize_std:
        deviation = group_std(rewards, group_index) + EPS
        centred = centred / np.where(group_size(group_index) > 1, deviation, 1.0)
    return centred.astype(np.float32)
