"""Cuts a batch into right-padded micro-batches of bounded size."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_core.types import Batch


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some samples of a batch, padded to the longest of them.

    A sample of 3 tokens [7, 9, 4] beside one of 2, its last token selected, reads

        tokens    [[7, 9, 4], [5, 6, 0]]
        columns   [0, 1, 2, 3, 4]            where their tokens lie in the batch's columns
        rows      [0], positions [1]         token 2 of row 0 is predicted at position 1
        targets   [4], selected [2]          it is token 4, entry 2 of `columns`

    Attributes:
        tokens: int64 [B, S], right-padded with 0.
        samples: index of each row in the batch, int64 [B].
        lengths: tokens of each row, int64 [B].
        columns: flat positions in the batch's columns, row after row, int64 [T], T = sum(lengths).
        selected: entries of `columns` whose logprob is wanted, int64 [M]; never a sample's first token.
        rows: row of each selected token, int64 [M].
        positions: position that predicts it (its own minus 1), int64 [M].
        targets: the token itself, int64 [M].
    """

    tokens: NDArray[np.int64]
    samples: NDArray[np.int64]
    lengths: NDArray[np.int64]
    columns: NDArray[np.int64]
    selected: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]


def cut(batch: Batch, max_tokens: int, *, all_tokens: bool = False) -> Iterator[MicroBatch]:
    """Yield the samples of a batch as micro-batches, sorted by length to waste little on padding.

    Args:
        batch: at least one sample, none of them empty.
        max_tokens: most tokens of a micro-batch, padding included; a longer sample gets one of its own.
        all_tokens: select every token but each sample's first, instead of those in loss_mask.
    """
    lengths = batch.lengths.astype(np.int64)
    order = np.argsort(lengths, kind="stable")
    starts = batch.offsets
    first = 0
    while first < len(order):
        stop = first + 1
        # Sorted by length: the next sample would be the longest, and set the width.
        while stop < len(order) and (stop + 1 - first) * lengths[order[stop]] <= max_tokens:
            stop += 1
        yield _micro_batch(batch, order[first:stop], starts, all_tokens)
        first = stop


def _micro_batch(batch: Batch, samples: NDArray[np.int64], starts: NDArray[np.int64], all_tokens: bool) -> MicroBatch:
    lengths = batch.lengths[samples].astype(np.int64)
    rows = np.repeat(np.arange(len(samples)), lengths)
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    columns = starts[samples][rows] + positions
    tokens = np.zeros((len(samples), lengths.max()), np.int64)
    tokens[rows, positions] = batch.tokens[columns]
    wanted = positions > 0
    if not all_tokens:
        wanted &= batch.loss_mask[columns]
    selected = np.flatnonzero(wanted)
    return MicroBatch(
        tokens=tokens,
        samples=samples.astype(np.int64),
        lengths=lengths,
        columns=columns,
        selected=selected,
        rows=rows[selected],
        positions=positions[selected] - 1,
        targets=batch.tokens[columns[selected]].astype(np.int64),
    )
