"""The examiner lets an honest engine pass and catches each kind of dishonest one."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from miles_core.types import VersionSpan
from miles_rollout import conformance
from miles_rollout.conformance import CHECKS, Subject
from miles_rollout.engine import Completion
from miles_rollout.errors import EngineUnavailable


def subject_of(engine: Any) -> Subject:
    return Subject(engine, engine.vocab_size, engine.context_length, deterministic=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_an_honest_engine_passes(check: conformance.Check, numpy_engine: Any) -> None:
    asyncio.run(check(subject_of(numpy_engine)))


def changed(**changes: Callable[[Completion], Any]) -> Callable[[Any], None]:
    """An engine whose completions are changed before they are handed out."""

    def corrupt(engine: Any) -> None:
        honest = engine.generate

        async def generate(*args: Any, **kwargs: Any) -> list[Completion]:
            completions = await honest(*args, **kwargs)
            return [
                dataclasses.replace(completion, **{name: change(completion) for name, change in changes.items()})
                for completion in completions
            ]

        engine.generate = generate

    return corrupt


def forget_a_sample(engine: Any) -> None:
    honest = engine.generate

    async def generate(*args: Any, **kwargs: Any) -> list[Completion]:
        return (await honest(*args, **kwargs))[1:]

    engine.generate = generate


def always_greedy(engine: Any) -> None:
    honest = engine._complete
    engine._complete = lambda last, sampling, seed: honest(last, dataclasses.replace(sampling, temperature=0.0), seed)


def ignore_top_k(engine: Any) -> None:
    honest = engine._complete
    engine._complete = lambda last, sampling, seed: honest(last, dataclasses.replace(sampling, top_k=-1), seed)


def ignore_seeds(engine: Any) -> None:
    honest = engine._complete
    rng = np.random.default_rng(7)
    engine._complete = lambda last, sampling, _: honest(last, sampling, int(rng.integers(1 << 30)))


def answer_while_paused(engine: Any) -> None:
    async def pause(mode: str = "abort") -> None:
        pass

    engine.pause = pause


def call_refusals_passing(engine: Any) -> None:
    honest = engine.generate

    async def generate(input_ids: Any, *args: Any, **kwargs: Any) -> list[Completion]:
        if not input_ids:
            raise EngineUnavailable("engine failed")
        return await honest(input_ids, *args, **kwargs)

    engine.generate = generate


DISHONEST: dict[str, tuple[Callable[[Any], None], conformance.Check]] = {
    "a sample less": (forget_a_sample, conformance.well_formed),
    "float64 logprobs": (changed(logprobs=lambda c: c.logprobs.astype(np.float64)), conformance.well_formed),
    "a nan": (changed(logprobs=lambda c: np.full_like(c.logprobs, np.nan)), conformance.well_formed),
    "a gap in the spans": (changed(version_spans=lambda c: c.version_spans[1:]), conformance.well_formed),
    "another version": (changed(version_spans=lambda c: (VersionSpan(0, len(c.tokens), 9),)), conformance.well_formed),
    "the stop token cut off": (
        changed(
            tokens=lambda c: c.tokens[:-1] if len(c.tokens) > 1 else c.tokens,
            logprobs=lambda c: c.logprobs[:-1] if len(c.tokens) > 1 else c.logprobs,
            version_spans=lambda c: (VersionSpan(0, max(len(c.tokens) - 1, 1), 0),),
        ),
        conformance.stops,
    ),
    "stops called length": (changed(finish_reason=lambda c: "length"), conformance.stops),
    "logprobs of another temperature": (changed(logprobs=lambda c: c.logprobs * 0.6), conformance.samples_what_it_says),
    "sampling without temperature": (always_greedy, conformance.samples_what_it_says),
    "more candidates than asked for": (ignore_top_k, conformance.narrows),
    "seeds without effect": (ignore_seeds, conformance.seeds_decide),
    "one response for all seeds": (always_greedy, conformance.seeds_decide),
    "answers while paused": (answer_while_paused, conformance.pauses),
    "refusals to be retried": (call_refusals_passing, conformance.refuses),
}


@pytest.mark.parametrize("name", DISHONEST)
def test_a_dishonest_engine_is_caught(name: str, numpy_engine: Any) -> None:
    corrupt, check = DISHONEST[name]
    corrupt(numpy_engine)
    with pytest.raises(AssertionError):
        asyncio.run(check(subject_of(numpy_engine)))
