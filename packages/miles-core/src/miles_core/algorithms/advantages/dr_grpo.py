"""Dr. GRPO."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.algorithms.advantages.shapes import group_mean
from miles_core.types import Floats


def dr_grpo(inputs: AdvantageInputs) -> Floats:
    """GRPO without the division: A_i = r_i - mean(r) over the group; easy and hard prompts keep their natural weight.

    The paper's loss also divides by a constant instead of each sample's length: reduction "constant_length".

    Source: Liu et al. 2025 (arXiv:2503.20783), section 3.2.

    Returns:
        Advantages, float32 [N].
    """
    return (inputs.totals - group_mean(inputs.totals, inputs.group_index)).astype(np.float32)
