"""Rewards that come with Miles: functions of a prompt, whose metadata holds the answer, and a sample."""

import re

from miles_core.errors import InputError
from miles_core.types import Prompt, Sample

_INTEGER = re.compile(r"-?\d+")


def exact_match(prompt: Prompt, sample: Sample, *, answer: str = "answer") -> float:
    """1 if the response, without blanks around it, is the answer; else 0.

    Args:
        prompt: its metadata holds the answer.
        sample: judged by its text.
        answer: key of the metadata.
    """
    return float(sample.text.strip() == _answer(prompt, answer).strip())


def position_match(prompt: Prompt, sample: Sample, *, answer: str = "answer") -> dict[str, float]:
    """Share of positions that are right, the end included; a dense reward for texts of known length.

    For an answer of n characters there are n + 1 positions: each character at its place, and the response ending right
    after them. "1234" against "1239": 4 of 5 = 0.8. The part "exact" is 1 when all are right.

    Args:
        prompt: its metadata holds the answer.
        sample: judged by its text and finish_reason.
        answer: key of the metadata.
    """
    wanted = _answer(prompt, answer)
    right = sum(map(str.__eq__, sample.text, wanted))
    right += sample.finish_reason == "stop" and len(sample.text) == len(wanted)
    return {"reward": right / (len(wanted) + 1), "exact": float(right == len(wanted) + 1)}


def last_integer(prompt: Prompt, sample: Sample, *, answer: str = "answer") -> float:
    """1 if the last integer of the response is the answer; else 0.

    Args:
        prompt: its metadata holds the answer, a number or its digits.
        sample: judged by its text.
        answer: key of the metadata.
    """
    found = _INTEGER.findall(sample.text)
    return float(bool(found) and int(found[-1]) == int(_answer(prompt, answer)))


def _answer(prompt: Prompt, key: str) -> str:
    if key not in prompt.metadata:
        raise InputError(
            "hooks.reward.answer",
            key,
            f"the metadata of prompt {prompt.id!r} has no such key",
            f"It has: {sorted(prompt.metadata)}.",
        )
    return str(prompt.metadata[key])
