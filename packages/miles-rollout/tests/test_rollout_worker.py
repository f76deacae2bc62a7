"""What the worker does with what engines and rewards give it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.errors import ContractViolation, RolloutError
from miles_core.types import Prompt, Sample
from miles_rollout import (
    EngineUnavailable,
    GenerateContext,
    InProcessJudge,
    Rollout,
    RolloutWorker,
    SamplingParams,
    Tokenizer,
    WorkerSettings,
    sample_seed,
    single_turn,
)

PROMPTS = [Prompt(f"row{number}", f"{number}=", {"answer": str(number)}) for number in range(6)]


def roll_out(engine: Any, model: Path, reward: Any, generate: Any = single_turn, **options: Any) -> Rollout:
    async def run() -> Rollout:
        sampling = SamplingParams(6, stop_token_ids=(13,))
        context = GenerateContext(engine, Tokenizer(str(model)), sampling, weight_version=0)
        settings = WorkerSettings(options.pop("group_size", 4), **options.pop("settings", {}))
        worker = RolloutWorker(context, InProcessJudge(reward, "the_reward"), settings, generate)
        try:
            return await worker.rollout(PROMPTS, step=options.get("step", 0), weight_version=options.get("version", 0))
        finally:
            await worker.close()

    return asyncio.run(run())


def count(prompt: Prompt, sample: Sample) -> dict[str, float]:
    return {"reward": float(sample.response_len), "digits": float(sum(map(str.isdigit, sample.text)))}


def test_groups_hold_what_was_generated(numpy_engine: Any, tiny_model: Path) -> None:
    made = roll_out(numpy_engine, tiny_model, count)
    assert [group.id for group in made.groups] == [prompt.id for prompt in PROMPTS] and not made.dropped
    assert numpy_engine.closed
    for number, group in enumerate(made.groups):
        assert len(group.samples) == 4
        for sample in group.samples:
            assert sample.tokens[:2].tolist() == [number, 10] and sample.tokens.dtype == np.int32
            assert sample.loss_mask.tolist() == [False] * 2 + [True] * (len(sample.tokens) - 2)
            assert not sample.rollout_logprobs[:2].any() and (sample.rollout_logprobs[2:] < 0).all()
            assert sample.version_spans == ((2, len(sample.tokens), 0),)
            assert sample.reward == sample.response_len and sample.reward_parts.keys() == {"digits"}
            stopped = sample.tokens[-1] == 13
            assert sample.finish_reason == ("stop" if stopped else "length") and not sample.text.endswith("<eos>")
    assert made.generate_s > 0 and made.reward_s >= 0


def test_seeds_make_it_repeatable(numpy_engine: Any, tiny_model: Path) -> None:
    def texts(**options: Any) -> list[list[str]]:
        made = roll_out(numpy_engine, tiny_model, count, **options)
        return [[sample.text for sample in group.samples] for group in made.groups]

    assert texts(step=3) == texts(step=3)
    assert texts(step=3) != texts(step=4)
    assert texts(settings={"seed": 1}) != texts(settings={"seed": 2})
    assert len({text for group in texts(group_size=8) for text in group}) > 8


@given(st.tuples(*[st.integers(0, 2**40)] * 4), st.tuples(*[st.integers(0, 2**40)] * 4))
def test_sample_seeds_fit_and_differ(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
    assert 0 <= sample_seed(*one) < 2**63
    assert (sample_seed(*one) == sample_seed(*other)) == (one == other)


def test_sample_seed_is_the_same_for_ever() -> None:
    assert sample_seed(1, 2, 3, 4) == 6152771116767582224


def test_a_failed_group_is_dropped_with_its_reason(numpy_engine: Any, tiny_model: Path) -> None:
    honest = numpy_engine.generate

    async def generate(input_ids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        if input_ids[0] == 2:
            raise EngineUnavailable("engine too slow", "no answer in 3 s")
        return await honest(input_ids, *args, **kwargs)

    def reward(prompt: Prompt, sample: Sample) -> float:
        if prompt.id == "row4" and len(sample.tokens) > 2:
            raise ValueError("what a row")
        return float("nan") if prompt.id == "row5" else 1.0

    numpy_engine.generate = generate
    made = roll_out(numpy_engine, tiny_model, reward)
    assert [group.id for group in made.groups] == ["row0", "row1", "row3"]
    assert [(item.prompt_id, item.reason) for item in made.dropped] == [
        ("row2", "engine too slow"), ("row4", "reward raised"), ("row5", "reward not finite"),
    ]  # fmt: skip
    assert made.dropped[1].detail == "the_reward: ValueError: what a row"
    assert made.dropped_reasons == {"engine too slow": 1, "reward raised": 1, "reward not finite": 1}


def test_no_group_at_all_is_an_error_that_names_the_culprit(numpy_engine: Any, tiny_model: Path) -> None:
    def reward(prompt: Prompt, sample: Sample) -> float:
        raise KeyError("solution")

    message = r"no group of step 7 .*: 6 of 6 dropped because of 'reward raised': the_reward: KeyError: 'sol.*row0"
    with pytest.raises(RolloutError, match=message):
        roll_out(numpy_engine, tiny_model, reward, step=7)


def test_wrong_weights_stop_the_step(numpy_engine: Any, tiny_model: Path) -> None:
    numpy_engine.version = 4
    assert roll_out(numpy_engine, tiny_model, count, version=4).groups[0].oldest_version == 4
    with pytest.raises(ContractViolation, match=r"weight_version 5 was published and the engine sampled with \[4\]"):
        roll_out(numpy_engine, tiny_model, count, version=5)


def test_what_is_late_is_dropped(numpy_engine: Any, tiny_model: Path) -> None:
    honest = numpy_engine.generate

    async def generate(input_ids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(30 * (input_ids[0] == 1))
        return await honest(input_ids, *args, **kwargs)

    numpy_engine.generate = generate
    made = roll_out(numpy_engine, tiny_model, count, settings={"deadline_s": 0.5})
    assert [(item.prompt_id, item.reason) for item in made.dropped] == [("row1", "rollout deadline")]
    assert len(made.groups) == 5


def test_a_generate_function_of_ones_own(numpy_engine: Any, tiny_model: Path) -> None:
    async def twice(prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample]:
        doubled = Prompt(prompt.id, prompt.content * 2)
        return await single_turn(doubled, seeds, context)

    made = roll_out(numpy_engine, tiny_model, count, twice)
    assert made.groups[3].samples[0].tokens[:4].tolist() == [3, 10, 3, 10] and made.groups[3].prompt is PROMPTS[3]


def test_a_bug_in_user_code_is_raised_as_it_is(numpy_engine: Any, tiny_model: Path) -> None:
    async def broken(prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample]:
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError, match="no such thing"):
        roll_out(numpy_engine, tiny_model, count, broken)
