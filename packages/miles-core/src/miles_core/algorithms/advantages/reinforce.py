"""REINFORCE."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.types import Floats


def reinforce(inputs: AdvantageInputs, *, baseline: bool = False) -> Floats:
    """The reward itself, A_i = r_i, or its distance from the mean reward of all samples of the step.

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".

    Args:
        inputs: rewards.
        baseline: subtract the mean over the step.

    Returns:
        Advantages, float32 [N].
    """
    totals = inputs.totals
    return (totals - totals.mean() if baseline and len(totals) else totals).astype(np.float32)
