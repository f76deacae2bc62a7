"""Answers in mathematics, compared as such: 1/2, 0.5 and 2/4 are the same. Needs miles-rollout[math]."""

import threading

from miles_core.types import Prompt, Sample
from miles_rollout.rewards.metadata import entry

try:
    import math_verify
except ImportError as error:
    raise ImportError('math-verify is not installed: pip install "miles-rollout[math]"') from error

_MARKED = ("\\boxed", "$", "\\(", "\\[")


def math_equal(prompt: Prompt, sample: Sample, *, answer: str = "answer", timeout_s: int = 5) -> float:
    r"""1 if the last expression of the response equals the answer, by math-verify; else 0.

    The response's answer is best in \boxed{}; without one, math-verify looks for LaTeX and then for plain numbers.

    Args:
        prompt: its metadata holds the answer: a number or LaTeX, bare or in $...$ or \boxed{}.
        sample: judged by its text.
        answer: key of the metadata.
        timeout_s: seconds for each of parsing and comparing; what takes longer is not equal. Off the main thread
            there is no such limit, but for the pool's.

    Raises:
        ValueError: the reference answer is not mathematics.
    """
    limit = timeout_s if threading.current_thread() is threading.main_thread() else None
    wanted = str(entry(prompt, answer))
    marked = wanted if any(mark in wanted for mark in _MARKED) else f"\\boxed{{{wanted}}}"
    gold = math_verify.parse(marked, parsing_timeout=limit)  # pyright: ignore[reportArgumentType]  None is no limit
    if not gold:
        raise ValueError(f"answer {wanted!r} of prompt {prompt.id!r} is not mathematics")
    found = math_verify.parse(sample.text, parsing_timeout=limit)  # pyright: ignore[reportArgumentType]
    return float(math_verify.verify(gold, found, timeout_seconds=limit))
