"""What is learned from a sample: advantages (numpy) and losses (torch, imported only when asked for)."""

from miles_core.algorithms.advantages import Advantage, grpo

__all__ = ["Advantage", "grpo"]
