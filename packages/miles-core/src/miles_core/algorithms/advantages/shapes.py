"""Sums by group, scans by sample, and whitening."""

from collections.abc import Callable

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs, Doubles
from miles_core.types import Bools, Ints

EPS = 1e-6  # as in the reference implementations: keeps a group of near-equal rewards from exploding


def group_mean(values: Doubles, group_index: Ints) -> Doubles:
    """At each sample the mean of its group, [N]."""
    return (np.bincount(group_index, values) / np.maximum(np.bincount(group_index), 1))[group_index]


def group_std(values: Doubles, group_index: Ints) -> Doubles:
    """At each sample the unbiased standard deviation of its group (n - 1, as torch.std), [N]; 0 for a group of one."""
    squares = np.bincount(group_index, (values - group_mean(values, group_index)) ** 2)
    return np.sqrt(squares / np.maximum(np.bincount(group_index) - 1, 1))[group_index]


def group_size(group_index: Ints) -> Ints:
    """At each sample the size of its group, [N]."""
    return np.bincount(group_index)[group_index].astype(np.int32)


def whiten(values: Doubles, mask: Bools) -> Doubles:
    """(values - mean) / sqrt(variance + 1e-8) over the mask, 0 outside; the variance is the unbiased one."""
    chosen = values[mask]
    if not len(chosen):
        return np.zeros_like(values)
    variance = chosen.var(ddof=1) if len(chosen) > 1 else 0.0
    return np.where(mask, (values - chosen.mean()) / np.sqrt(variance + 1e-8), 0.0)


def scan_back(inputs: AdvantageInputs, *columns: Doubles, step: Callable[..., tuple[Doubles, Doubles]]) -> Doubles:
    """Go through the trained tokens of all samples at once, from their last ones to their first.

    Tokens between them that are not trained (a tool's answer) are passed over as if they were not there.

    Args:
        inputs: whose trained tokens they are.
        columns: float64 [T] each.
        step: given what it carried, [N], and the columns at one token of each sample, [N] each, returns what to write
            there and what to carry on, [N] each. It starts with zeros, and beyond a sample's end columns are zeros.

    Returns:
        What was written, float64 [T], 0 outside loss_mask.
    """
    sample = inputs.sample_index[inputs.loss_mask]
    counts = np.bincount(sample, minlength=len(inputs.lengths))
    place = np.arange(len(sample)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.zeros((len(columns), counts.max(initial=0), len(counts)))
    for row, column in zip(rows, columns, strict=True):
        row[place, sample] = column[inputs.loss_mask]
    written = np.zeros(rows.shape[1:])
    carried = np.zeros(len(counts))
    for position in reversed(range(len(written))):
        written[position], carried = step(carried, *rows[:, position])
    result = np.zeros(len(inputs.loss_mask))
    result[inputs.loss_mask] = written[place, sample]
    return result
