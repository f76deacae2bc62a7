"""Advantages in plain numpy: rewards of the groups of a step in, one number per sample out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from miles_core.types import Floats

EPS = 1e-6  # as in the reference implementations: keeps a group of near-equal rewards from exploding


class Advantage(Protocol):
    """Maps the rewards of a step, group by group, to advantages of the same shape."""

    def __call__(self, rewards: Sequence[Floats]) -> list[Floats]:
        """Take rewards float32 [G] of each group; return advantages float32 [G] of each group."""
        ...


def grpo(rewards: Sequence[Floats], *, normalize_std: bool = True) -> list[Floats]:
    """Group-relative advantages: A_i = (r_i - mean(r)) / (std(r) + EPS), the mean and std over the group.

    Without the division (`normalize_std=False`) easy and hard prompts keep their natural weight; that is Dr. GRPO.
    A group of equal rewards gives zeros either way. The standard deviation is the unbiased one (n - 1), as torch.std.

    Sources: DeepSeekMath (arXiv:2402.03300), section 4.1.2; Dr. GRPO (arXiv:2503.20783), section 3.2.

    Args:
        rewards: float32 [G] of each group.
        normalize_std: divide by the standard deviation of the group.

    Returns:
        Advantages, float32 [G] of each group.
    """
    advantages: list[Floats] = []
    for group in rewards:
        centred = group.astype(np.float64) - np.mean(group, dtype=np.float64)
        if normalize_std and len(group) > 1:
            centred = centred / (np.std(group, dtype=np.float64, ddof=1) + EPS)
        advantages.append(centred.astype(np.float32))
    return advantages
