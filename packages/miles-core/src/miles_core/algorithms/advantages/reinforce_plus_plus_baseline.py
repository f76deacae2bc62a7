"""REINFORCE++ with the group's mean as its baseline."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.algorithms.advantages.shapes import group_mean, whiten
from miles_core.types import Floats


def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Floats:
    """r_i - mean(r) of the group at each trained token, whitened over all trained tokens of the step.

    The paper adds k2's KL to the loss: `[algorithm.kl] estimator = "k2"`.

    Source: Hu et al. 2025 (arXiv:2501.03262), section 3, "REINFORCE++ with baseline".

    Returns:
        Advantages, float32 [T].
    """
    centred = inputs.totals - group_mean(inputs.totals, inputs.group_index)
    return whiten(inputs.spread(centred), inputs.loss_mask).astype(np.float32)
