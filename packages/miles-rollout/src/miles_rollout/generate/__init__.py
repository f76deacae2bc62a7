"""How samples are made from a prompt: the generate function, and the built-in ones."""

from miles_rollout.generate.multi_turn import multi_turn
from miles_rollout.generate.single_turn import single_turn
from miles_rollout.generate.tools import Tool
from miles_rollout.generate.types import GenerateContext, GenerateFn, LostSample

__all__ = [  # noqa: RUF022 (grouped by subject)
    # the protocol
    "GenerateContext",
    "GenerateFn",
    "LostSample",
    # built in
    "multi_turn",
    "single_turn",
    "Tool",
]
