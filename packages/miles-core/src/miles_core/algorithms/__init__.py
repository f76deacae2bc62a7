"""What is learned from a sample: advantages and reductions (numpy), losses and corrections (torch, asked for alone)."""

from miles_core.algorithms.advantages import Advantage, AdvantageInputs, Estimates, grpo
from miles_core.algorithms.needs import needs, needs_of

__all__ = ["Advantage", "AdvantageInputs", "Estimates", "grpo", "needs", "needs_of"]
