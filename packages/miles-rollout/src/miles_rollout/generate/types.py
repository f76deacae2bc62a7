"""The generate function: where a user decides how a prompt becomes samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from miles_core.types import Prompt, Sample
from miles_rollout.engine import Engine, SamplingParams
from miles_rollout.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class GenerateContext:
    """What a generate function works with.

    Attributes:
        engine: to sample from.
        tokenizer: of the model.
        sampling: how tokens are drawn, with the model's stop tokens.
        weight_version: of the weights that should sample: the namespace of cached prefixes.
    """

    engine: Engine
    tokenizer: Tokenizer
    sampling: SamplingParams
    weight_version: int


@dataclass(frozen=True, slots=True)
class LostSample:
    """In place of a sample that could not be made; the others of its group go on.

    Attributes:
        reason: a few words, the same for the same cause.
        detail: what is known besides.
    """

    reason: str
    detail: str = ""


class GenerateFn(Protocol):
    """Make the samples of one prompt."""

    async def __call__(
        self, prompt: Prompt, seeds: Sequence[int], context: GenerateContext
    ) -> Sequence[Sample | LostSample]:
        """Return what was made of each seed: a sample, several (branches of a conversation), or why there is none.

        A sample whose reward is already a number is not judged again. An EngineError drops the group with its reason.
        """
        ...
