"""Where prompts come from.

Save as my_data_source.py, and say in the recipe

    [data]
    source = { name = "my_data_source:Sums", largest = 99 }
"""

from collections.abc import Sequence

import numpy as np

from miles_core import Prompt


class Sums:
    """Endless sums of two numbers, made from the seed and the position alone, so that a run resumes where it was."""

    def __init__(self, seed: int, largest: int = 99):
        """`seed` is the run's; the other parameters are the recipe's."""
        self._seed, self._largest = seed, largest

    def __call__(self, start: int, count: int) -> Sequence[Prompt]:
        """Prompts number `start` to `start + count`."""
        return [self._prompt(position) for position in range(start, start + count)]

    def _prompt(self, position: int) -> Prompt:
        one, two = np.random.default_rng([self._seed, position]).integers(0, self._largest + 1, 2).tolist()
        return Prompt(f"sum:{position}", f"{one}+{two}=", {"answer": str(one + two)})
