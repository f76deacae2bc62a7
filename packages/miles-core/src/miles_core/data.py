"""Prompts from a file: JSON lines or Parquet, at any position, in an order that a seed decides.

A position counts prompts from the start of the run: with N rows, positions 0..N-1 are the first epoch, N..2N-1 the
second. The same file, seed and position give the same prompt on every machine, so the cursor of a run is one number.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from miles_core._rows import Rows, open_rows
from miles_core.types import Prompt


class FilePrompts:
    """A data source over the rows of one file; made by `file_prompts`."""

    def __init__(self, rows: Rows, name: str, prompt_field: str, seed: int, shuffle: bool):
        """Take rows that were checked."""
        self._rows, self._name, self._prompt_field = rows, name, prompt_field
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def num_rows(self) -> int:
        """Rows of the file: prompts of one epoch."""
        return len(self._rows)

    def __call__(self, start: int, count: int) -> list[Prompt]:
        """Return prompts `start` to `start + count` of an endless sequence."""
        positions = [divmod(position, len(self._rows)) for position in range(start, start + count)]
        places = [(epoch, self._row_at(epoch, place)) for epoch, place in positions]
        rows = self._rows.read([row for _, row in places])
        return [self._prompt(epoch, row, values) for (epoch, row), values in zip(places, rows, strict=True)]

    def _prompt(self, epoch: int, row: int, values: dict[str, Any]) -> Prompt:
        content = values.pop(self._prompt_field)
        return Prompt(f"{self._name}:{self._rows.number(row)}@{epoch}", content, values)

    def _row_at(self, epoch: int, place: int) -> int:
        if not self._shuffle:
            return place
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._rows), self._seed, epoch)
        return int(self._order[place])


def file_prompts(path: Path | str, prompt_field: str = "prompt", shuffle: bool = True, seed: int = 0) -> FilePrompts:
    """Open a file of prompts and check every row.

    Of a JSONL file only the offsets of its lines stay in memory. A Parquet file is held as Arrow columns, because its
    row groups cannot be read one row at a time.

    Args:
        path: `.jsonl` (one JSON object a line; blank lines are skipped) or `.parquet`.
        prompt_field: the column that holds the prompt: text, or a list of chat messages, each with the text fields
            "role" and "content". The other columns become `Prompt.metadata`.
        shuffle: a new order every epoch; else the order of the file, over and over.
        seed: decides the orders; >= 0.

    Returns:
        A data source. Prompts are named `<stem of the file>:<row>@<epoch>`: the number of the line in a JSONL file, of
        the row in a Parquet file, both from 1.

    Raises:
        InputError: the file cannot be read, holds no row, or holds one that is no prompt; names the row and the rule.
    """
    path = Path(path)
    return FilePrompts(open_rows(path, prompt_field), path.stem, prompt_field, seed, shuffle)


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows in one epoch: a permutation of 0..num_rows-1, int64.

    Sorts the raw output of a seeded bit generator. numpy promises that stream for ever (NEP 19), unlike what
    `Generator.permutation` makes of it.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(keys, kind="stable").astype(np.int64)
