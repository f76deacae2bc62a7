"""Advantages in plain numpy: what a step earned in, one number per sample or per token out.

Each is one function in one file.
"""

from miles_core.algorithms.advantages.dr_grpo import dr_grpo
from miles_core.algorithms.advantages.gae import gae
from miles_core.algorithms.advantages.gdpo import gdpo
from miles_core.algorithms.advantages.grpo import grpo
from miles_core.algorithms.advantages.inputs import Advantage, AdvantageInputs, Estimates
from miles_core.algorithms.advantages.kl_penalty import with_kl_penalty
from miles_core.algorithms.advantages.preference import preference
from miles_core.algorithms.advantages.reinforce import reinforce
from miles_core.algorithms.advantages.reinforce_plus_plus import reinforce_plus_plus
from miles_core.algorithms.advantages.reinforce_plus_plus_baseline import reinforce_plus_plus_baseline
from miles_core.algorithms.advantages.rloo import rloo
from miles_core.algorithms.advantages.shapes import EPS

__all__ = [
    "EPS",
    "Advantage",
    "AdvantageInputs",
    "Estimates",
    "dr_grpo",
    "gae",
    "gdpo",
    "grpo",
    "preference",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "with_kl_penalty",
]
