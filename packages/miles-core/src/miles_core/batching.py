"""From judged groups to what each trainer rank learns from: columns, loss weights, balanced shards, minibatches.

    groups, advantages ─▶ make_batch ─▶ shard ─▶ one Batch a rank ─▶ split_minibatches ─▶ one a rank and update

The reduction of the loss lives in `loss_weights` alone: every rank sums `loss_weights * loss` over what it holds,
gradients are summed over ranks, and the result is the mean that the recipe asked for, whatever the packing.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from miles_core.algorithms.advantages import AdvantageInputs
from miles_core.algorithms.reductions import token_mean
from miles_core.errors import InputError, RolloutError
from miles_core.hooks import Reduction
from miles_core.types import Batch, Floats, Group, Ints, Sample


def advantage_inputs(groups: Sequence[Group], columns: Mapping[str, Floats] | None = None) -> AdvantageInputs:
    """Lay the groups of a step out as an advantage estimator sees them.

    Args:
        groups: judged groups, of any sizes.
        columns: optional columns of the estimator, float32 [T] each; see `sample_columns`.
    """
    samples = [sample for group in groups for sample in group.samples]
    names = set[str]().union(*(sample.reward_parts for sample in samples))
    parts = {
        name: np.asarray([sample.reward_parts.get(name, np.nan) for sample in samples], np.float32)
        for name in sorted(names)
    }
    return AdvantageInputs(
        rewards=np.asarray([sample.reward for sample in samples], np.float32),
        group_index=_group_index(groups),
        lengths=_lengths(samples),
        loss_mask=_column((sample.loss_mask for sample in samples), np.bool_),
        reward_parts=parts,
        rollout_logprobs=_column((sample.rollout_logprobs for sample in samples), np.float32),
        **(columns or {}),
    )


def sample_columns(groups: Sequence[Group], names: Iterable[str]) -> dict[str, Floats]:
    """Further columns that rollout code put into the samples, float32 [T] each.

    Args:
        groups: of the step.
        names: those wanted.

    Raises:
        InputError: a sample lacks one of them, or it is not a number per token.
    """
    samples = [sample for group in groups for sample in group.samples]
    for name in names:
        for sample in samples:
            found = np.shape(sample.columns[name]) if name in sample.columns else None
            if found != sample.tokens.shape:
                raise InputError(
                    f"columns[{name!r}] of a sample",
                    "not there" if found is None else found,
                    f"the algorithm needs {name} of every token, {sample.tokens.shape}",
                    f"Put it into Sample.columns in the generate function (it has: {sorted(sample.columns)}).",
                )
    return {name: _column((sample.columns[name] for sample in samples), np.float32) for name in names}


def staleness(groups: Sequence[Group], weight_version: int) -> Floats:
    """How many updates old the weights were that sampled each token, float32 [T]; 0 where none did.

    Args:
        groups: of the step.
        weight_version: the trainer's current version.
    """
    samples = [sample for group in groups for sample in group.samples]
    columns = [np.zeros(len(sample.tokens), np.float32) for sample in samples]
    for sample, column in zip(samples, columns, strict=True):
        for start, stop, version in sample.version_spans:
            column[start:stop] = weight_version - version
    return _column(columns, np.float32)


def make_batch(
    groups: Sequence[Group],
    advantages: Floats,
    reduction: Reduction = token_mean,
    columns: Mapping[str, Floats] | None = None,
) -> Batch:
    """Lay the groups of a step out as columns.

    Args:
        groups: judged groups, of any sizes.
        advantages: float32 [N], one per sample, or [T], one per token, in the order of the groups.
        reduction: what each token counts; see miles_core.algorithms.reductions.
        columns: further columns that the loss needs, float32 [T] each.

    Returns:
        The whole step as one batch; samples in the order of the groups. It owns its memory.

    Raises:
        RolloutError: no token of the step is trained.
        InputError: the advantages do not fit the groups, or are not finite; or the weights are not.
        ValueError: a sample's columns differ in length, its first token is trained, or it has no version span.
    """
    samples = [sample for group in groups for sample in group.samples]
    for sample in samples:
        _check_sample(sample)
    lengths = _lengths(samples)
    loss_mask = _column((sample.loss_mask for sample in samples), np.bool_)
    num_loss_tokens = int(loss_mask.sum())
    by_token = _advantages_by_token(groups, advantages, lengths, loss_mask)
    if not num_loss_tokens:
        raise RolloutError(
            f"trained tokens = 0 in {len(groups)} groups of {len(samples)} samples: a step needs at least one. "
            "Look at the samples and at the filter: every response is empty or masked."
        )
    unweighted = Batch(
        tokens=_column((sample.tokens for sample in samples), np.int32),
        lengths=lengths,
        loss_mask=loss_mask,
        rollout_logprobs=_column((sample.rollout_logprobs for sample in samples), np.float32),
        advantages=by_token,
        loss_weights=np.zeros(len(loss_mask), np.float32),
        rewards=np.asarray([sample.reward for sample in samples], np.float32),
        versions=np.asarray([sample.oldest_version for sample in samples], np.int64),
        group_index=_group_index(groups),
        num_loss_tokens=num_loss_tokens,
        num_samples=len(samples),
        columns={name: np.array(column, np.float32) for name, column in (columns or {}).items()},
    )
    (batch,) = _weighed([unweighted], reduction)
    return batch


def shard(batch: Batch, num_ranks: int, num_minibatches: int = 1, *, whole_groups: bool = False) -> list[Batch]:
    """Deal whole samples to data-parallel ranks so that all of them have about as many tokens.

    Longest first, each to the rank that has least (Graham 1969): the fullest rank is within 4/3 of the best deal.
    Ranks wait for each other at every optimizer update, so each minibatch is balanced by itself.

    Args:
        batch: the whole step.
        num_ranks: data-parallel ranks.
        num_minibatches: optimizer updates of the step, as will be given to `split_minibatches`.
        whole_groups: deal whole groups, for losses that compare the samples of a group.

    Returns:
        One shard a rank, samples in the step's order; weights and totals are those of the whole step. A shard is empty
        where there are fewer samples than ranks.
    """
    rank_of = np.zeros(len(batch.lengths), np.int32)
    minibatch_of = _minibatch_of(batch.group_index, _num_groups([batch]), num_minibatches)
    totals = [0] * num_ranks
    for minibatch in range(num_minibatches):
        members = np.flatnonzero(minibatch_of == minibatch)
        dealt = batch.group_index[members] if whole_groups else members
        _, unit = np.unique(dealt, return_inverse=True)
        num_tokens = np.bincount(unit, batch.lengths[members]).astype(np.int32)
        rank_of[members] = _deal(num_tokens, totals)[unit]
    return [batch.take(np.flatnonzero(rank_of == rank)) for rank in range(num_ranks)]


def split_minibatches(
    shards: Sequence[Batch], num_minibatches: int, reduction: Reduction = token_mean
) -> list[list[Batch]]:
    """Split the shards of a step into the batches of its optimizer updates, by whole groups in their order.

    Args:
        shards: one batch a rank, from `shard`.
        num_minibatches: optimizer updates wanted.
        reduction: as was given to `make_batch`; now it is taken over each update.

    Returns:
        For each update one batch a rank. Its weights and its totals are those of the update over all ranks.
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
            updates.append(_weighed(parts, reduction))
    return updates


def _weighed(parts: Sequence[Batch], reduction: Reduction) -> list[Batch]:
    """The parts of one update with the weights and totals that they have together."""
    per_part = [_trained(part) for part in parts]
    num_tokens = np.concatenate(per_part)
    weights = np.asarray(reduction(num_tokens, np.concatenate([part.group_index for part in parts])), np.float64)
    if weights.shape != num_tokens.shape or not np.isfinite(weights[num_tokens > 0]).all():
        raise InputError(
            "algorithm.reduction",
            weights.tolist() if weights.shape == num_tokens.shape else weights.shape,
            f"must return one finite weight a sample: {num_tokens.shape}",
            "Change the reduction.",
        )
    cuts = np.cumsum([len(trained) for trained in per_part])[:-1]
    return [
        replace(
            part,
            loss_weights=np.where(part.loss_mask, np.repeat(own, part.lengths), 0.0).astype(np.float32),
            num_loss_tokens=int(num_tokens.sum()),
            num_samples=len(num_tokens),
        )
        for part, own in zip(parts, np.split(weights, cuts), strict=True)
    ]


def _trained(part: Batch) -> Ints:
    """Trained tokens of each sample, int32 [N]."""
    sample_index = np.repeat(np.arange(len(part.lengths)), part.lengths)
    return np.bincount(sample_index[part.loss_mask], minlength=len(part.lengths)).astype(np.int32)


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


def _advantages_by_token(
    groups: Sequence[Group], advantages: Floats, lengths: Ints, loss_mask: NDArray[np.bool_]
) -> Floats:
    given = np.shape(advantages)
    if given not in (lengths.shape, loss_mask.shape):
        raise InputError(
            "algorithm.advantage",
            given,
            f"must return one number a sample, {lengths.shape}, or one a token, {loss_mask.shape}",
            "Change the advantage function.",
        )
    values = np.asarray(advantages, np.float32)
    if given == lengths.shape:
        values = np.repeat(values, lengths)
    by_token = np.where(loss_mask, values, 0).astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(by_token))
    if len(wrong):
        sample = np.repeat(np.arange(len(lengths)), lengths)[wrong[0]]
        group = groups[int(_group_index(groups)[sample])]
        raise InputError(
            "algorithm.advantage",
            float(by_token[wrong[0]]),
            f"must be finite; the rewards of group {group.id} are {group.rewards.tolist()}",
            "Change the advantage function or the reward.",
        )
    return by_token


def _group_index(groups: Sequence[Group]) -> Ints:
    return np.repeat(np.arange(len(groups)), [len(group.samples) for group in groups]).astype(np.int32)


def _lengths(samples: Sequence[Sample]) -> Ints:
    return np.asarray([len(sample.tokens) for sample in samples], np.int32)


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
