"""From judged groups to what each trainer rank learns from: columns, loss weights, balanced shards, minibatches.

    groups, advantages ─▶ make_batch ─▶ shard ─▶ one Batch a rank ─▶ split_minibatches ─▶ one a rank and update

The reduction of the loss lives in `loss_weights` alone: every rank sums `loss_weights * loss` over what it holds,
gradients are summed over ranks, and the result is the mean that the recipe asked for, whatever the packing.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from miles_core.errors import InputError, RolloutError
from miles_core.types import Batch, Floats, Group, Ints, Sample

Reduction = Literal["token_mean", "sample_mean"]


def make_batch(groups: Sequence[Group], advantages: Sequence[Floats], reduction: Reduction = "token_mean") -> Batch:
    """Lay the groups of a step out as columns.

    Args:
        groups: judged groups, of any sizes.
        advantages: one number per sample, float32 [G] of each group.
        reduction: "token_mean": every trained token of the step weighs the same (DAPO, arXiv:2503.14476, eq. 8);
            "sample_mean": every sample that has trained tokens does, and within it every token (GRPO, arXiv:2402.03300,
            eq. 3).

    Returns:
        The whole step as one batch; samples in the order of the groups. It owns its memory.

    Raises:
        RolloutError: no token of the step is trained.
        InputError: the advantages do not fit the groups, or are not finite.
        ValueError: a sample's columns differ in length, its first token is trained, or it has no version span.
    """
    samples = [sample for group in groups for sample in group.samples]
    for sample in samples:
        _check_sample(sample)
    per_sample = _flat_advantages(groups, advantages)
    lengths = np.asarray([len(sample.tokens) for sample in samples], np.int32)
    loss_mask = _column((sample.loss_mask for sample in samples), np.bool_)
    num_loss_tokens = int(loss_mask.sum())
    if not num_loss_tokens:
        raise RolloutError(
            f"trained tokens = 0 in {len(groups)} groups of {len(samples)} samples: a step needs at least one. "
            "Look at the samples and at the filter: every response is empty or masked."
        )
    return Batch(
        tokens=_column((sample.tokens for sample in samples), np.int32),
        lengths=lengths,
        loss_mask=loss_mask,
        rollout_logprobs=_column((sample.rollout_logprobs for sample in samples), np.float32),
        advantages=np.where(loss_mask, np.repeat(per_sample, lengths), np.float32(0)),
        loss_weights=_loss_weights(loss_mask, lengths, reduction),
        rewards=np.asarray([sample.reward for sample in samples], np.float32),
        versions=np.asarray([sample.oldest_version for sample in samples], np.int64),
        group_index=np.repeat(np.arange(len(groups)), [len(g.samples) for g in groups]).astype(np.int32),
        num_loss_tokens=num_loss_tokens,
        num_samples=len(samples),
    )


def shard(batch: Batch, num_ranks: int, num_minibatches: int = 1) -> list[Batch]:
    """Deal whole samples to data-parallel ranks so that all of them have about as many tokens.

    Longest first, each to the rank that has least (Graham 1969): the fullest rank is within 4/3 of the best deal.
    Ranks wait for each other at every optimizer update, so each minibatch is balanced by itself.

    Args:
        batch: the whole step.
        num_ranks: data-parallel ranks.
        num_minibatches: optimizer updates of the step, as will be given to `split_minibatches`.

    Returns:
        One shard a rank, samples in the step's order; weights and totals are those of the whole step. A shard is empty
        where there are fewer samples than ranks.
    """
    rank_of = np.zeros(len(batch.lengths), np.int32)
    minibatch_of = _minibatch_of(batch.group_index, _num_groups([batch]), num_minibatches)
    totals = [0] * num_ranks
    for minibatch in range(num_minibatches):
        members = np.flatnonzero(minibatch_of == minibatch)
        rank_of[members] = _deal(batch.lengths[members], totals)
    return [batch.take(np.flatnonzero(rank_of == rank)) for rank in range(num_ranks)]


def split_minibatches(shards: Sequence[Batch], num_minibatches: int) -> list[list[Batch]]:
    """Split the shards of a step into the batches of its optimizer updates, by whole groups in their order.

    Args:
        shards: one batch a rank, from `shard`.
        num_minibatches: optimizer updates wanted.

    Returns:
        For each update one batch a rank. Its weights sum to 1 over the ranks, and its totals are those of the update.
        There are fewer updates than wanted when there are fewer groups with trained tokens: an update of nothing is
        left out.
    """
    num_groups = _num_groups(shards)
    of_shard = [_minibatch_of(shard.group_index, num_groups, num_minibatches) for shard in shards]
    updates: list[list[Batch]] = []
    for minibatch in range(num_minibatches):
        parts = [
            shard.take(np.flatnonzero(minibatch_of == minibatch))
            for shard, minibatch_of in zip(shards, of_shard, strict=True)
        ]
        if any(part.loss_mask.any() for part in parts):
            updates.append(_normalised(parts))
    return updates


def _normalised(parts: Sequence[Batch]) -> list[Batch]:
    total = sum(float(part.loss_weights.sum(dtype=np.float64)) for part in parts)
    num_loss_tokens = sum(int(part.loss_mask.sum()) for part in parts)
    num_samples = sum(len(part.lengths) for part in parts)
    return [
        replace(
            part,
            loss_weights=(part.loss_weights / total).astype(np.float32),
            num_loss_tokens=num_loss_tokens,
            num_samples=num_samples,
        )
        for part in parts
    ]


def _num_groups(batches: Iterable[Batch]) -> int:
    return 1 + max((int(batch.group_index.max()) for batch in batches if len(batch.group_index)), default=-1)


def _minibatch_of(group_index: Ints, num_groups: int, num_minibatches: int) -> NDArray[np.int64]:
    return group_index.astype(np.int64) * num_minibatches // max(num_groups, 1)


def _deal(lengths: Ints, totals: list[int]) -> Ints:
    """The rank of each sample, int32 [N]. Ties go to the rank with the smaller total so far; `totals` is updated."""
    ranks = np.zeros(len(lengths), np.int32)
    heap = [(0, total, rank) for rank, total in enumerate(totals)]
    heapq.heapify(heap)
    for index in np.argsort(-lengths, kind="stable"):
        load, total, rank = heap[0]
        ranks[index] = rank
        length = int(lengths[index])
        heapq.heapreplace(heap, (load + length, total + length, rank))
    for _, total, rank in heap:
        totals[rank] = total
    return ranks


def _loss_weights(loss_mask: NDArray[np.bool_], lengths: Ints, reduction: Reduction) -> Floats:
    if reduction == "token_mean":
        return (loss_mask / loss_mask.sum()).astype(np.float32)
    sample_index = np.repeat(np.arange(len(lengths)), lengths)
    trained = np.bincount(sample_index[loss_mask], minlength=len(lengths))
    shares = 1.0 / (np.maximum(trained, 1) * np.count_nonzero(trained))
    return np.where(loss_mask, shares[sample_index], 0.0).astype(np.float32)


def _flat_advantages(groups: Sequence[Group], advantages: Sequence[Floats]) -> Floats:
    wanted = [(len(group.samples),) for group in groups]
    given = [np.shape(values) for values in advantages]
    if wanted != given:
        raise InputError(
            "algorithm.advantage",
            given,
            f"must return one array a group, one number a sample: {wanted}",
            "Change the advantage function.",
        )
    for group, values in zip(groups, advantages, strict=True):
        if not np.isfinite(values).all():
            raise InputError(
                "algorithm.advantage",
                np.asarray(values).tolist(),
                f"must be finite; the rewards of group {group.id} are {group.rewards.tolist()}",
                "Change the advantage function or the reward.",
            )
    return _column(advantages, np.float32)


def _check_sample(sample: Sample) -> None:
    shapes = {np.shape(column) for column in (sample.tokens, sample.loss_mask, sample.rollout_logprobs)}
    if len(shapes) != 1:
        raise ValueError(f"tokens, loss_mask and rollout_logprobs have shapes {shapes}: they must be equal")
    if len(sample.loss_mask) and sample.loss_mask[0]:
        raise ValueError("loss_mask[0] = True: nothing predicts the first token, so it cannot be trained")
    if not sample.version_spans:
        raise ValueError("version_spans = (): one span at least must say which weights took part")


def _column[T: np.generic](parts: Iterable[NDArray[T]], dtype: type[T]) -> NDArray[T]:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False)
