import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core.config import HookSpec, RewardSection
from miles_core.errors import InputError
from miles_core.types import Prompt, Sample, VersionSpan
from miles_rollout.rewards import (
    InProcessJudge,
    RewardPool,
    Verdict,
    exact_match,
    last_integer,
    make_judge,
    position_match,
)


def prompt(answer: Any) -> Prompt:
    return Prompt("p", "?", {"answer": answer})


def sample(text: str, finish_reason: str = "stop") -> Sample:
    tokens = np.zeros(2, np.int32)
    return Sample(tokens, tokens == 0, tokens.astype(np.float32), (VersionSpan(1, 2, 0),), finish_reason, text)


@pytest.mark.parametrize(
    ("text", "finish_reason", "reward", "exact"),
    [
        ("1234", "stop", 1.0, 1.0),
        ("1239", "stop", 0.8, 0.0),
        ("1234", "length", 0.8, 0.0),  # never ended
        ("12345", "stop", 0.8, 0.0),  # ended too late
        ("123", "stop", 0.6, 0.0),
        ("", "stop", 0.0, 0.0),
        ("234", "length", 0.0, 0.0),  # shifted
        ("<pad>1234", "stop", 0.0, 0.0),
    ],
)
def test_position_match(text: str, finish_reason: str, reward: float, exact: float) -> None:
    parts = position_match(prompt("1234"), sample(text, finish_reason))
    assert parts == {"reward": pytest.approx(reward), "exact": exact}


@given(st.text("0123456789", max_size=6), st.text("0123456789", max_size=6), st.sampled_from(["stop", "length"]))
def test_position_match_is_a_share_and_exact_only_when_all_is_right(wanted: str, text: str, reason: str) -> None:
    parts = position_match(prompt(wanted), sample(text, reason))
    assert 0 <= parts["reward"] <= 1
    assert (parts["exact"] == 1) == (parts["reward"] == 1) == (text == wanted and reason == "stop")


def test_exact_match() -> None:
    assert exact_match(prompt("yes"), sample(" yes\n")) == 1.0
    assert exact_match(prompt("yes"), sample("yes!")) == 0.0
    assert exact_match(Prompt("p", "?", {"label": 7}), sample("7"), answer="label") == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [("921", 1.0), ("874 or 921.", 1.0), ("921 or 874", 0.0), ("none", 0.0), ("-921", 0.0), ("0921", 1.0), ("", 0.0)],
)
def test_last_integer(text: str, reward: float) -> None:
    assert last_integer(prompt(921), sample(text)) == reward


def test_a_prompt_without_the_answer_is_named() -> None:
    with pytest.raises(InputError, match="metadata of prompt 'p' has no such key"):
        exact_match(Prompt("p", "?", {"solution": "1"}), sample("1"))


def test_in_process() -> None:
    async def doubled(prompt: Prompt, sample: Sample) -> float:
        return 2.0 * len(sample.text)

    def broken(prompt: Prompt, sample: Sample) -> float:
        return 1 / len(sample.text)

    samples = [sample("abc"), sample("")]
    assert asyncio.run(InProcessJudge(doubled, "doubled").judge(prompt(""), samples)) == [Verdict(6.0), Verdict(0.0)]
    good, bad = asyncio.run(InProcessJudge(broken, "broken").judge(prompt(""), samples))
    assert good == Verdict(1 / 3)
    assert (bad.failure, bad.detail) == ("reward raised", "broken: ZeroDivisionError: division by zero")


def test_from_the_recipe() -> None:
    trusted = RewardSection(isolate=False)  # pyright: ignore[reportCallIssue]
    judge = make_judge(HookSpec(name="exact_match", params={"answer": "label"}), trusted)
    verdicts = asyncio.run(judge.judge(Prompt("p", "?", {"label": "7"}), [sample("7")]))
    assert isinstance(judge, InProcessJudge) and verdicts == [Verdict(1.0)]
    isolated = make_judge(HookSpec(name="my_package:score"), RewardSection())  # pyright: ignore[reportCallIssue]
    assert isinstance(isolated, RewardPool)
    with pytest.raises(InputError, match=r"hooks\.reward"):
        make_judge(HookSpec(name="my_package:score"), trusted)
