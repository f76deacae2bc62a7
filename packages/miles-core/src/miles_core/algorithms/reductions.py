"""What each token's loss counts: how the losses of all tokens become one number, in plain numpy.

Each function takes the number of trained tokens of each sample of an optimizer update, int [N], at least one in all,
and their groups, int [N]; it returns the weight of a trained token of each sample, float64 [N]. The loss is the sum of
weight * loss over the trained tokens of the update. Samples without any take no part.
"""

import numpy as np
from numpy.typing import NDArray

from miles_core.types import Ints

Weights = NDArray[np.float64]


def token_mean(num_tokens: Ints, group_index: Ints) -> Weights:
    """The mean over all tokens (DAPO, arXiv:2503.14476, eq. 8): long samples count more."""
    return np.full(len(num_tokens), 1.0 / num_tokens.sum())


def sample_mean(num_tokens: Ints, group_index: Ints) -> Weights:
    """The mean over samples of the mean over their tokens (GRPO, arXiv:2402.03300, eq. 3)."""
    return 1.0 / (np.maximum(num_tokens, 1) * np.count_nonzero(num_tokens))


def sample_sum(num_tokens: Ints, group_index: Ints) -> Weights:
    """The mean over samples of the sum over their tokens: the policy gradient of whole samples."""
    return np.full(len(num_tokens), 1.0 / np.count_nonzero(num_tokens))


def group_mean(num_tokens: Ints, group_index: Ints) -> Weights:
    """The mean over groups of the mean over all their tokens: each prompt counts the same."""
    by_group = np.bincount(group_index, num_tokens)
    return 1.0 / (np.maximum(by_group, 1) * np.count_nonzero(by_group))[group_index]


def constant_length(num_tokens: Ints, group_index: Ints, *, length: int) -> Weights:
    """The sum over a sample's tokens divided by a constant, averaged over samples (Dr. GRPO, arXiv:2503.20783).

    Args:
        num_tokens: see above.
        group_index: see above.
        length: the constant, usually rollout.max_new_tokens; > 0.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1: it divides")
    return np.full(len(num_tokens), 1.0 / (np.count_nonzero(num_tokens) * length))
