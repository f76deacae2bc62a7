"""Rewards that come with Miles: functions of a prompt, whose metadata holds the answer, and a sample."""

import re

import regex  # has time limits, which the standard library's has not

from miles_core.types import Prompt, Sample
from miles_rollout.rewards.metadata import entry

_INTEGER = re.compile(r"-?\d+")


def exact_match(prompt: Prompt, sample: Sample, *, answer: str = "answer") -> float:
    """1 if the response, without blanks around it, is the answer; else 0.

    Args:
        prompt: its metadata holds the answer.
        sample: judged by its text.
        answer: key of the metadata.
    """
    return float(sample.text.strip() == str(entry(prompt, answer)).strip())


def position_match(prompt: Prompt, sample: Sample, *, answer: str = "answer") -> dict[str, float]:
    """Share of positions that are right, the end included; a dense reward for texts of known length.

    For an answer of n characters there are n + 1 positions: each character at its place, and the response ending right
    after them. "1234" against "1239": 4 of 5 = 0.8. The part "exact" is 1 when all are right.

    Args:
        prompt: its metadata holds the answer.
        sample: judged by its text and finish_reason.
        answer: key of the metadata.
    """
    wanted = str(entry(prompt, answer))
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
    return float(bool(found) and int(found[-1]) == int(entry(prompt, answer)))


def regex_match(
    prompt: Prompt, sample: Sample, *, pattern: str, answer: str = "answer", timeout_s: float = 1.0
) -> float:
    """1 if the last match of a pattern is the answer; else 0.

    Compared is the pattern's first group; a pattern without one need only match somewhere. Blanks around do not count.

    Args:
        prompt: its metadata holds the answer, if the pattern has a group.
        sample: judged by its text.
        pattern: a regular expression, in which "." matches line ends as well.
        answer: key of the metadata.
        timeout_s: seconds for the search.

    Raises:
        TimeoutError: the pattern takes longer than that on this text: it backtracks without end.
    """
    compiled = regex.compile(pattern, regex.DOTALL)
    matches = list(compiled.finditer(sample.text, timeout=timeout_s))
    if not matches or not compiled.groups:
        return float(bool(matches))
    return float((matches[-1][1] or "").strip() == str(entry(prompt, answer)).strip())
