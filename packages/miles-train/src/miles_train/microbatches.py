"""Cuts a batch into micro-batches of bounded size: right-padded rows, or samples packed end to end into one."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from miles_core.types import Batch


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some samples of a batch: padded to the longest of them, or packed end to end.

    A sample of 3 tokens [7, 9, 4] beside one of 2, [5, 6], the last token of each selected, reads

        padded: tokens [[7, 9, 4], [5, 6, 0]]    packed: tokens [[7, 9, 4, 5, 6]], ends [3, 5]
                rows [0, 1], positions [1, 0]            rows [0, 0], positions [1, 3]

        columns [0, 1, 2, 3, 4]      where their tokens lie in the batch's columns
        targets [4, 6]               the selected tokens; each is predicted at (row, position)
        selected [2, 4]              their entries in `columns`

    Attributes:
        tokens: int64 [B, S], right-padded with 0; [1, S] if packed, 0 after the last sample.
        samples: index of each sample in the batch, int64 [N].
        lengths: tokens of each, int64 [N].
        columns: flat positions in the batch's columns, sample after sample, int64 [T], T = sum(lengths).
        selected: entries of `columns` whose logprob is wanted, int64 [M]; never a sample's first token.
        rows: row of each selected token, int64 [M].
        positions: position that predicts it (its own minus 1), int64 [M].
        targets: the token itself, int64 [M].
        ends: where each segment of a packed row ends, int32 [N], or [N + 1] where tokens were appended to fill the row
            (they are a segment of their own); None if padded.
    """

    tokens: NDArray[np.int64]
    samples: NDArray[np.int64]
    lengths: NDArray[np.int64]
    columns: NDArray[np.int64]
    selected: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    ends: NDArray[np.int32] | None = None


def far_enough(micro: MicroBatch, ahead: int) -> NDArray[np.int64]:
    """Which of the selected tokens can be predicted from `ahead` positions further back in their sample, int64 [K]."""
    begins = np.zeros(1, np.int64) if micro.ends is None else np.append(0, micro.ends[:-1])
    first = begins[np.searchsorted(begins, micro.positions, side="right") - 1]
    return np.flatnonzero(micro.positions - ahead >= first)


def cut(batch: Batch, max_tokens: int, *, all_tokens: bool = False, whole_groups: bool = False) -> Iterator[MicroBatch]:
    """Yield the samples of a batch as padded micro-batches, sorted by length to waste little on padding.

    Args:
        batch: at least one sample, none of them empty.
        max_tokens: most tokens of a micro-batch, padding included; a longer sample gets one of its own.
        all_tokens: select every token but each sample's first, instead of those in loss_mask.
        whole_groups: keep the samples of a group together, for losses that compare them.
    """
    lengths = batch.lengths.astype(np.int64)
    units = sorted(_units(batch, whole_groups), key=lambda samples: lengths[samples].max())
    while units:
        taken, count = 0, 0
        # Sorted by length: the next unit would have the longest sample, and set the width.
        while taken < len(units) and (
            not taken or (count + len(units[taken])) * lengths[units[taken]].max() <= max_tokens
        ):
            count += len(units[taken])
            taken += 1
        yield _padded(batch, np.concatenate(units[:taken]), all_tokens)
        units = units[taken:]


def cut_packed(
    batch: Batch, max_tokens: int, *, all_tokens: bool = False, multiple: int = 1, whole_groups: bool = False
) -> Iterator[MicroBatch]:
    """Yield the samples of a batch as packed micro-batches: as few as fit, filled evenly.

    Args:
        batch: at least one sample, none of them empty.
        max_tokens: most tokens of a micro-batch; a longer sample gets one of its own.
        all_tokens: select every token but each sample's first, instead of those in loss_mask.
        multiple: tokens are appended until a row's length is a multiple of this (sequence parallelism divides it).
        whole_groups: keep the samples of a group together, for losses that compare them.
    """
    units = _units(batch, whole_groups)
    num_tokens = np.array([batch.lengths[samples].sum() for samples in units], np.int64)
    for chosen in _balanced(num_tokens, max_tokens):
        samples = np.sort(np.concatenate([units[unit] for unit in chosen]))
        yield _packed(batch, samples, all_tokens, multiple)


def _units(batch: Batch, whole_groups: bool) -> list[NDArray[np.int64]]:
    """Samples that must stay together, in the batch's order."""
    if not whole_groups:
        return list(np.arange(len(batch.lengths))[:, None])
    return [np.flatnonzero(batch.group_index == group) for group in np.unique(batch.group_index)]


def _balanced(lengths: NDArray[np.int64], max_tokens: int) -> list[NDArray[np.int64]]:
    """Samples by micro-batch, each in the batch's order.

    The longest sample first goes to the emptiest micro-batch (Graham 1969, "Bounds on multiprocessing timing
    anomalies"); one more micro-batch is tried until all fit.
    """
    order = np.argsort(-lengths, kind="stable")
    num_bins = max(1, -(-int(np.minimum(lengths, max_tokens).sum()) // max_tokens))
    while True:
        loads = [(0, index) for index in range(num_bins)]
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        for sample in order:
            load, index = loads[0]
            bins[index].append(int(sample))
            heapq.heapreplace(loads, (load + int(lengths[sample]), index))
        if all(len(samples) <= 1 or lengths[samples].sum() <= max_tokens for samples in bins):
            return [np.sort(np.array(samples, np.int64)) for samples in bins if samples]
        num_bins += 1


def _padded(batch: Batch, samples: NDArray[np.int64], all_tokens: bool) -> MicroBatch:
    lengths, rows, positions, columns = _places(batch, samples)
    tokens = np.zeros((len(samples), lengths.max()), np.int64)
    tokens[rows, positions] = batch.tokens[columns]
    selected = _selected(batch, positions, columns, all_tokens)
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


def _packed(batch: Batch, samples: NDArray[np.int64], all_tokens: bool, multiple: int) -> MicroBatch:
    lengths, _, positions, columns = _places(batch, samples)
    size = -(-len(columns) // multiple) * multiple
    tokens = np.zeros((1, size), np.int64)
    tokens[0, : len(columns)] = batch.tokens[columns]
    ends = np.cumsum(lengths)
    if size > len(columns):
        ends = np.append(ends, size)
    selected = _selected(batch, positions, columns, all_tokens)
    return MicroBatch(
        tokens=tokens,
        samples=samples.astype(np.int64),
        lengths=lengths,
        columns=columns,
        selected=selected,
        rows=np.zeros(len(selected), np.int64),
        positions=selected - 1,
        targets=batch.tokens[columns[selected]].astype(np.int64),
        ends=ends.astype(np.int32),
    )


def _places(batch: Batch, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Length of each sample; and of each of their tokens the sample's number, its position and its column."""
    lengths = batch.lengths[samples].astype(np.int64)
    rows = np.repeat(np.arange(len(samples)), lengths)
    positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return lengths, rows, positions, batch.offsets[samples][rows] + positions


def _selected(
    batch: Batch, positions: NDArray[np.int64], columns: NDArray[np.int64], all_tokens: bool
) -> NDArray[np.int64]:
    wanted = positions > 0
    if not all_tokens:
        wanted &= batch.loss_mask[columns]
    return np.flatnonzero(wanted)
