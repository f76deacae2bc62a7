"""Corrections of what sampling engine and trainer disagree about, in torch: a factor for each token's loss.

The engine that sampled and the trainer that learns compute the same policy with other kernels and in other precision.
The ratio between the two is an importance weight; these are the ways to keep it bounded.
"""

from miles_core.algorithms import _torch  # noqa: F401  # pyright: ignore[reportUnusedImport]  # first: names the extra
from miles_core.algorithms.corrections.icepop import IcePop
from miles_core.algorithms.corrections.mis import MIS
from miles_core.algorithms.corrections.ratio import Level, rollout_ratio
from miles_core.algorithms.corrections.tis import TIS

__all__ = ["MIS", "TIS", "IcePop", "Level", "rollout_ratio"]
