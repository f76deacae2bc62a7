"""Prompts by past success: those that are solved sometimes come more often than those always or never solved.

The weight of a prompt is the variance of its success, p (1 - p), which is also what a policy gradient can learn from
it ("learnability", arXiv:2502.12272), on top of a floor, so that none is given up. p is the share of past successes,
the older ones fading, counted from one half: what was never tried is as promising as can be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from miles_core.errors import InputError
from miles_core.hooks import DataSource
from miles_core.types import Ints, Prompt


@dataclass(frozen=True, slots=True)
class CurriculumSettings:
    """How past success decides.

    Attributes:
        seed: of the draws.
        threshold: a sample with at least this reward is a success.
        floor: weight of a prompt that is always or never solved, where one that is solved half the time has 1; > 0.
        fade: what past tries of a prompt count for after another group of it, from 0 (nothing) to 1 (all).
    """

    seed: int = 0
    threshold: float = 0.5
    floor: float = 0.05
    fade: float = 0.8

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.floor <= 1:
            raise InputError("curriculum.floor", self.floor, "must be above 0 and at most 1", "0.05 is usual.")
        if not 0 <= self.fade <= 1:
            raise InputError("curriculum.fade", self.fade, "must be from 0 to 1", "0.8 is usual.")


class Curriculum:
    """A data source over the rows of another, drawn by past success. Its state belongs into the checkpoint.

    Between two calls of `observe` prompts are drawn without repetition, and position and state alone decide which: the
    same state and positions give the same prompts.
    """

    def __init__(self, rows: DataSource, num_rows: int, settings: CurriculumSettings | None = None):
        """Nothing is known of any row.

        Args:
            rows: position `i < num_rows` is row i, e.g. `file_prompts(PATH, shuffle=False)`.
            num_rows: how many there are.
            settings: how past success decides.
        """
        if num_rows < 1:
            raise InputError("num_rows", num_rows, "must be at least 1", "Give a file with prompts.")
        self._rows, self._num_rows, self._settings = rows, num_rows, settings or CurriculumSettings()
        self._tries = np.zeros(num_rows)
        self._successes = np.zeros(num_rows)
        self._since = 0
        self._order = self._draw()

    def __call__(self, start: int, count: int) -> list[Prompt]:
        """Return prompts `start` to `start + count`; `start` is not before the cursor of the last `observe`.

        Prompts are named `<name of the row>#<row>@<position>`.

        Raises:
            ValueError: positions of the past, whose draws are forgotten.
        """
        if start < self._since:
            raise ValueError(f"start = {start}: positions before {self._since} were drawn in a state of the past")
        prompts: list[Prompt] = []
        for position in range(start, start + count):
            row = int(self._order[(position - self._since) % self._num_rows])
            (prompt,) = self._rows(row, 1)
            prompts.append(replace(prompt, id=f"{prompt.id.rpartition('@')[0] or prompt.id}#{row}@{position}"))
        return prompts

    @property
    def success(self) -> np.ndarray:
        """The estimated success of each row, float64 [num_rows]."""
        return (self._successes + 0.5) / (self._tries + 1.0)

    def observe(self, rewards: Mapping[str, Sequence[float]], cursor: int) -> None:
        """Learn how groups went, those that were dropped included.

        Args:
            rewards: of each group that was judged, by its prompt's id (`Rollout.rewards`).
            cursor: position up to which prompts were drawn; draws go on there, by what is known now.
        """
        settings = self._settings
        for prompt_id, values in rewards.items():
            row = int(prompt_id.rpartition("#")[2].partition("@")[0])
            successes = sum(value >= settings.threshold for value in values)
            self._tries[row] = settings.fade * self._tries[row] + len(values)
            self._successes[row] = settings.fade * self._successes[row] + successes
        self._since = cursor
        self._order = self._draw()

    def state(self) -> dict[str, Any]:
        """All that is known, JSON-able: rows that were tried, and where the current draws began."""
        (tried,) = np.nonzero(self._tries)
        return {
            "since": self._since,
            "rows": tried.tolist(),
            "tries": self._tries[tried].tolist(),
            "successes": self._successes[tried].tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned.

        Raises:
            InputError: it is of a source with more rows.
        """
        rows = np.asarray(state["rows"], np.int64)
        if rows.size and rows.max() >= self._num_rows:
            raise InputError(
                "curriculum state",
                int(rows.max()),
                f"there is no such row: the source has {self._num_rows}",
                "Resume with the data that the run began with.",
            )
        self._tries, self._successes = np.zeros(self._num_rows), np.zeros(self._num_rows)
        self._tries[rows], self._successes[rows] = state["tries"], state["successes"]
        self._since = int(state["since"])
        self._order = self._draw()

    def metrics(self) -> dict[str, float]:
        """What is known of the rows, by slash names."""
        tried = self._tries > 0
        known = self.success[tried]
        return {
            "curriculum/tried": float(tried.mean()),
            "curriculum/success": float(known.mean()) if known.size else 0.0,
            "curriculum/solved": float((known > 0.9).mean()) if known.size else 0.0,
            "curriculum/unsolved": float((known < 0.1).mean()) if known.size else 0.0,
        }

    def _draw(self) -> Ints:
        """All rows in a random order, the heavier the earlier: weighted draws without repetition.

        Each row gets the key E / weight, E exponential; the order of keys is that of the draws (Efraimidis & Spirakis,
        2006). Raw bits of a seeded generator, which numpy keeps stable (NEP 19), so that machines agree.
        """
        success, floor = self.success, self._settings.floor
        weights = floor + (1 - floor) * 4 * success * (1 - success)
        bits = np.random.PCG64(np.random.SeedSequence([self._settings.seed, self._since])).random_raw(self._num_rows)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
        return np.argsort(-np.log(uniform) / weights, kind="stable").astype(np.int32)
