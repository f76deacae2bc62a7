"""What the rest of Miles expects of an engine, whatever serves it. `miles_rollout.conformance` examines one.

A response of two tokens, the second the end of the text, sampled by the weights of version 5:

    tokens         [4, 2]          int32
    logprobs       [-0.7, -0.1]    float32, of the sampled tokens at the sampling temperature
    finish_reason  "stop"
    version_spans  ((0, 2, 5),)    offsets within the response
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from miles_core.types import VersionSpan

FinishReason = Literal["stop", "length", "abort"]
PauseMode = Literal["abort", "retract", "in_place"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: most tokens of one response, the stop token included.
        temperature: logits are divided by it, for the reported logprobs too; 0 takes the most probable token.
        top_p: nucleus; below 1 the reported logprobs are still those of the full distribution.
        top_k: number of candidates, -1 for all.
        stop_token_ids: a response ends with the first of these, which stays part of it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One response.

    Attributes:
        tokens: sampled ids as the engine made them, int32 [R]; at least one.
        logprobs: log probability of each, finite, float32 [R].
        finish_reason: "stop" (a stop token, which is the last), "length", or "abort" (somebody ended it).
        version_spans: which weights sampled which tokens, offsets within the response, without gaps.
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]


class Engine(Protocol):
    """A language model that samples. All methods run on one event loop and have deadlines of their own."""

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        num_samples: int,
        *,
        seeds: Sequence[int] | None = None,
        namespace: str = "",
    ) -> list[Completion]:
        """Sample responses to one prompt.

        Args:
            input_ids: the prompt, at least one token.
            sampling: the same for all samples.
            num_samples: responses wanted, G.
            seeds: one per sample, 0 <= seed < 2**63. An engine started as deterministic gives the same response to the
                same prompt, weights and seed, whatever else it serves; others ignore them.
            namespace: cached prefixes are shared within one namespace only. Callers put the weight version here.

        Returns:
            G completions, in the order of `seeds`.

        Raises:
            EngineUnavailable: no answer after all retries.
            EngineError: a request that it refuses, or an answer that cannot be learned from.
        """
        ...

    async def health(self) -> None:
        """Raise EngineUnavailable unless the engine, down to the model, answers."""
        ...

    async def weight_version(self) -> int:
        """The version of the weights that the next token will be sampled from."""
        ...

    async def flush_cache(self) -> None:
        """Forget cached prefixes. Raises EngineError while requests run."""
        ...

    async def pause(self, mode: PauseMode = "abort") -> None:
        """Stop sampling: end running requests, set them back to recompute, or freeze them in place."""
        ...

    async def resume(self) -> None:
        """Go on after `pause`."""
        ...

    async def close(self) -> None:
        """Let go of connections; the engine itself lives on."""
        ...
