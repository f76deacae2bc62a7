"""How samples are made from a prompt: the generate function, and the built-in ones."""

from miles_rollout.generate.single_turn import single_turn
from miles_rollout.generate.types import GenerateContext, GenerateFn

__all__ = ["GenerateContext", "GenerateFn", "single_turn"]
