"""Pairs for DPO."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.types import Floats


def preference(inputs: AdvantageInputs) -> Floats:
    """Of each group the best sample is chosen (1), the worst rejected (-1), and the others are left out (0).

    Of equals the first counts. A group of equal rewards has no pair: all 0.

    Returns:
        Advantages for the loss "dpo", float32 [N].
    """
    totals = inputs.totals
    signs = np.zeros(len(totals), np.float32)
    for group in np.unique(inputs.group_index):
        members = np.flatnonzero(inputs.group_index == group)
        best, worst = members[totals[members].argmax()], members[totals[members].argmin()]
        if totals[best] > totals[worst]:
            signs[best], signs[worst] = 1, -1
    return signs
