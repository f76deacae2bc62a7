"""REINFORCE leave-one-out."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.algorithms.advantages.shapes import group_mean, group_size
from miles_core.types import Floats


def rloo(inputs: AdvantageInputs) -> Floats:
    """Leave-one-out baseline: A_i = r_i - mean of the other rewards of the group = n / (n - 1) * (r_i - mean(r)).

    Unbiased, since the baseline of a sample does not contain it. In a group of one there are no others: 0.

    Sources: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"; Ahmadian et al. 2024
    (arXiv:2402.14740), section 3.

    Returns:
        Advantages, float32 [N].
    """
    size = group_size(inputs.group_index)
    centred = inputs.totals - group_mean(inputs.totals, inputs.group_index)
    return (size / np.maximum(size - 1, 1) * centred).astype(np.float32)
