"""What each token's loss counts.

Save as my_reduction.py, and say in the recipe

    [algorithm]
    reduction = { name = "my_reduction:root_mean", power = 0.5 }
"""

import numpy as np
from numpy.typing import NDArray

from miles_core.types import Ints


def root_mean(num_tokens: Ints, group_index: Ints, *, power: float = 0.5) -> NDArray[np.float64]:
    """Between "sample_mean" (power 0) and "token_mean" (power 1): a sample of n tokens counts n ** power."""
    counts = np.maximum(num_tokens, 1).astype(np.float64)
    total = np.sum(counts**power, where=num_tokens > 0)
    return counts ** (power - 1) / total  # of each of its n tokens
