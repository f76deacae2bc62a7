"""Endless tasks with a known answer, as data sources: each prompt is made from the seed and its position alone.

The reference answer is `metadata["answer"]`; the rewards that compare with it are rollout's.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from miles_core.hooks import DataSource
from miles_core.types import Prompt


def copy_digits(seed: int = 0, digits: int = 4) -> DataSource:
    """Copy a string of digits: prompt "1234=", answer "1234".

    Written for a tokenizer of single characters: `digits` + 1 tokens in, `digits` and the end of text out.

    Args:
        seed: decides the prompts; >= 0.
        digits: how many to copy; > 0.
    """
    if digits < 1:
        raise ValueError(f"digits={digits} must be at least 1: there is nothing to copy otherwise")
    return _endless(partial(_copy_prompt, seed=seed, digits=digits))


def largest_number(seed: int = 0) -> DataSource:
    """Name the largest of four numbers from 10 to 999, in plain words, as one chat message.

    Always answering with the first number is right in a quarter of the cases: compare with that.

    Args:
        seed: decides the prompts; >= 0.
    """
    return _endless(partial(_largest_prompt, seed=seed))


def _endless(prompt_at: Callable[[int], Prompt]) -> DataSource:
    return partial(_take, prompt_at)


def _take(prompt_at: Callable[[int], Prompt], start: int, count: int) -> list[Prompt]:
    return [prompt_at(position) for position in range(start, start + count)]


def _copy_prompt(position: int, seed: int, digits: int) -> Prompt:
    answer = "".join(str(draw % 10) for draw in _draws(seed, position, digits))
    return Prompt(f"copy:{position}", f"{answer}=", {"answer": answer})


def _largest_prompt(position: int, seed: int) -> Prompt:
    numbers = [10 + draw % 990 for draw in _draws(seed, position, 4)]
    listed = ", ".join(map(str, numbers))
    text = f"Which is the largest number: {listed}? Reply with only the number."
    message = {"role": "user", "content": text}
    return Prompt(f"largest:{position}", [message], {"answer": str(max(numbers))})


def _draws(seed: int, position: int, count: int) -> list[int]:
    """Random 64-bit integers of this position: raw output of a bit generator, which numpy keeps stable (NEP 19)."""
    return np.random.PCG64(np.random.SeedSequence([seed, position])).random_raw(count).tolist()
