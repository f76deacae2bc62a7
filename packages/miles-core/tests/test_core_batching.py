from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import Batch, Group, InputError, Prompt, RolloutError, Sample, VersionSpan
from miles_core.algorithms import grpo
from miles_core.algorithms.reductions import constant_length, group_mean, sample_mean, sample_sum, token_mean
from miles_core.batching import advantage_inputs, make_batch, sample_columns, shard, split_minibatches, staleness
from miles_core.hooks import Reduction

REDUCTIONS: tuple[Reduction, ...] = (
    token_mean,
    sample_mean,
    sample_sum,
    group_mean,
    partial(constant_length, length=8),
)


def grpo_of(groups: Sequence[Group]) -> np.ndarray:
    return grpo(advantage_inputs(groups))


@dataclass(frozen=True)
class Step:
    """Groups with their advantages, and how they are dealt."""

    groups: list[Group]
    advantages: np.ndarray
    reduction: Reduction
    num_ranks: int
    num_minibatches: int

    @property
    def batch(self) -> Batch:
        return make_batch(self.groups, self.advantages, self.reduction)


@st.composite
def steps(draw: Callable[..., Any]) -> Step:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = [Group(Prompt(f"p{i}", "x"), tuple(_sample(rng) for _ in range(n))) for i, n in enumerate(sizes)]
    groups[0] = Group(groups[0].prompt, (_sample(rng, 3), *groups[0].samples[1:]))  # one trained token at least
    advantages = grpo_of(groups)
    reduction = draw(st.sampled_from(REDUCTIONS))
    return Step(groups, advantages, reduction, draw(st.integers(1, 5)), draw(st.integers(1, 4)))


def _sample(rng: np.random.Generator, response_len: int | None = None) -> Sample:
    prompt_len = int(rng.integers(1, 4))
    response_len = int(rng.integers(0, 9)) if response_len is None else response_len
    length = prompt_len + response_len
    loss_mask = np.arange(length) >= prompt_len
    if response_len > 3:
        loss_mask[prompt_len + 1] = False  # a token that a tool put there
    return Sample(
        tokens=rng.integers(0, 1000, length).astype(np.int32),
        loss_mask=loss_mask,
        rollout_logprobs=(-rng.random(length) * loss_mask).astype(np.float32),
        version_spans=(VersionSpan(prompt_len, length, int(rng.integers(0, 5))),),
        finish_reason="stop",
        reward=float(rng.random()),
    )


def weighted_loss(batches: Sequence[Batch]) -> float:
    """A loss that is different for every token: its own id times its advantage."""
    return sum(float(np.sum(b.loss_weights.astype(np.float64) * b.tokens * b.advantages)) for b in batches)


def rows(batch: Batch) -> list[tuple[Any, ...]]:
    """The samples of a batch as values that can be compared and sorted."""
    starts = batch.offsets
    columns = (batch.tokens, batch.loss_mask, batch.rollout_logprobs, batch.advantages)
    return [
        (
            int(batch.group_index[i]),
            float(batch.rewards[i]),
            int(batch.versions[i]),
            *(tuple(column[starts[i] : starts[i + 1]].tolist()) for column in columns),
        )
        for i in range(len(batch.lengths))
    ]


def test_two_groups_by_hand(make_sample: Callable[..., Sample]):
    one = make_sample(prompt_len=1, response_len=1, reward=1.0)
    two = make_sample(prompt_len=1, response_len=3, reward=0.0)
    groups = [Group(Prompt("a", "x"), (one, two)), Group(Prompt("b", "x"), (one,))]
    advantages = np.array([0.5, -0.5, 2], np.float32)
    batch = make_batch(groups, advantages)
    assert batch.tokens.tolist() == [0, 1, 0, 1, 2, 3, 0, 1]
    assert batch.lengths.tolist() == [2, 4, 2]
    assert batch.loss_mask.tolist() == [False, True, False, True, True, True, False, True]
    assert batch.advantages.tolist() == [0, 0.5, 0, -0.5, -0.5, -0.5, 0, 2]
    np.testing.assert_allclose(batch.loss_weights, np.array([0, 1, 0, 1, 1, 1, 0, 1]) / 5, rtol=1e-6)
    np.testing.assert_allclose(
        make_batch(groups, advantages, sample_mean).loss_weights,
        np.array([0, 1, 0, 1 / 3, 1 / 3, 1 / 3, 0, 1]) / 3,
        rtol=1e-6,
    )
    assert batch.rewards.tolist() == [1, 0, 1]
    assert batch.versions.tolist() == [3, 3, 3]
    assert batch.group_index.tolist() == [0, 0, 1]
    assert (batch.num_loss_tokens, batch.num_samples) == (5, 3)


@given(steps())
def test_the_columns_have_the_types_they_promise(step: Step):
    batch = step.batch
    kinds = {
        "tokens": np.int32,
        "lengths": np.int32,
        "loss_mask": np.bool_,
        "rollout_logprobs": np.float32,
        "advantages": np.float32,
        "loss_weights": np.float32,
        "rewards": np.float32,
        "versions": np.int64,
        "group_index": np.int32,
    }
    for part in [batch, *shard(batch, step.num_ranks)]:
        assert {name: getattr(part, name).dtype for name in kinds} == kinds


@given(steps())
def test_the_weighted_sum_is_the_mean_that_was_asked_for(step: Step):
    batch = step.batch
    samples = [sample for group in step.groups for sample in group.samples]
    means = [
        (int(sample.loss_mask.sum()), float(np.sum(sample.tokens[sample.loss_mask]) * float(advantage)), group)
        for sample, advantage, group in zip(samples, step.advantages, batch.group_index.tolist(), strict=True)
        if sample.loss_mask.any()
    ]
    groups = {group: [pair for *pair, found in means if found == group] for *_, group in means}
    expected = {
        token_mean: sum(total for _, total, _ in means) / sum(count for count, *_ in means),
        sample_mean: sum(total / count for count, total, _ in means) / len(means),
        sample_sum: sum(total for _, total, _ in means) / len(means),
        group_mean: np.mean([sum(t for _, t in pairs) / sum(n for n, _ in pairs) for pairs in groups.values()]),
        REDUCTIONS[-1]: sum(total for _, total, _ in means) / 8 / len(means),
    }[step.reduction]
    assert weighted_loss([batch]) == pytest.approx(expected, rel=1e-4, abs=1e-2)
    assert not batch.loss_weights[~batch.loss_mask].any()
    assert not batch.advantages[~batch.loss_mask].any()


@given(steps())
def test_shards_hold_each_sample_once_and_add_up_to_the_step(step: Step):
    batch = step.batch
    shards = shard(batch, step.num_ranks, step.num_minibatches)
    assert len(shards) == step.num_ranks
    assert sorted(row for part in shards for row in rows(part)) == sorted(rows(batch))
    assert weighted_loss(shards) == pytest.approx(weighted_loss([batch]), rel=1e-4, abs=1e-2)
    assert {(part.num_loss_tokens, part.num_samples) for part in shards} == {(batch.num_loss_tokens, batch.num_samples)}
    again = shard(batch, step.num_ranks, step.num_minibatches)
    assert [rows(part) for part in again] == [rows(part) for part in shards]


@given(steps())
def test_shards_are_balanced_by_tokens(step: Step):
    batch = step.batch
    loads = [int(part.lengths.sum()) for part in shard(batch, step.num_ranks)]
    assert max(loads) - min(loads) <= int(batch.lengths.max())
    ideal = max(sum(loads) / step.num_ranks, int(batch.lengths.max()))
    assert max(loads) <= 4 / 3 * ideal + batch.lengths.max() / 3


def test_each_minibatch_is_balanced_by_itself(make_group: Callable[..., Group]):
    groups = [make_group([8, 8, 1, 1]), make_group([6, 2, 2])]
    shards = shard(make_batch(groups, grpo_of(groups)), 2, num_minibatches=2)
    for update in split_minibatches(shards, 2):
        loads = [int(part.lengths.sum()) for part in update]
        assert loads[0] == loads[1]


@given(steps())
def test_minibatches_hold_whole_groups_and_weights_of_means_sum_to_one(step: Step):
    shards = shard(step.batch, step.num_ranks, step.num_minibatches)
    updates = split_minibatches(shards, step.num_minibatches, step.reduction)
    seen: list[int] = []
    for update in updates:
        assert len(update) == step.num_ranks
        if step.reduction in (token_mean, sample_mean, group_mean):
            assert sum(float(part.loss_weights.sum(dtype=np.float64)) for part in update) == pytest.approx(1, abs=1e-5)
        members = sorted({int(group) for part in update for group in part.group_index})
        assert members == list(range(members[0], members[-1] + 1))
        seen += members
        num_samples = sum(len(step.groups[group].samples) for group in members)
        num_loss_tokens = sum(int(part.loss_mask.sum()) for part in update)
        assert {(part.num_samples, part.num_loss_tokens) for part in update} == {(num_samples, num_loss_tokens)}
        assert sum(len(part.lengths) for part in update) == num_samples
    assert len(seen) == len(set(seen))
    trained = {i for i, group in enumerate(step.groups) if any(s.loss_mask.any() for s in group.samples)}
    assert trained <= set(seen)


@given(steps())
def test_a_minibatch_is_what_its_groups_alone_would_have_made(step: Step):
    shards = shard(step.batch, step.num_ranks, step.num_minibatches)
    for update in split_minibatches(shards, step.num_minibatches, step.reduction):
        members = sorted({int(group) for part in update for group in part.group_index})
        own = np.isin(step.batch.group_index, members)
        alone = make_batch([step.groups[i] for i in members], step.advantages[own], step.reduction)
        assert weighted_loss(update) == pytest.approx(weighted_loss([alone]), rel=1e-4, abs=1e-2)
        assert (update[0].num_loss_tokens, update[0].num_samples) == (alone.num_loss_tokens, alone.num_samples)


@given(steps())
def test_one_minibatch_is_the_step(step: Step):
    shards = shard(step.batch, step.num_ranks)
    (update,) = split_minibatches(shards, 1)
    assert [rows(part) for part in update] == [rows(part) for part in shards]


def test_more_minibatches_than_groups_are_as_many_as_groups(make_group: Callable[..., Group]):
    groups = [make_group([3, 3]), make_group([2, 2])]
    batch = make_batch(groups, grpo_of(groups))
    assert len(split_minibatches(shard(batch, 2, 5), 5)) == 2


def test_more_ranks_than_samples_leave_empty_shards(make_group: Callable[..., Group]):
    group = make_group([3])
    shards = shard(make_batch([group], grpo_of([group])), 3)
    assert sorted(len(part.lengths) for part in shards) == [0, 0, 1]
    (update,) = split_minibatches(shards, 1)
    assert [part.num_loss_tokens for part in update] == [3, 3, 3]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_step_without_trained_tokens_is_an_error(make_group: Callable[..., Group], lengths: list[int]):
    groups = [make_group(lengths)] if lengths else []
    with pytest.raises(RolloutError, match="trained tokens = 0"):
        make_batch(groups, grpo_of(groups))


@pytest.mark.parametrize(
    "advantages",
    [[], np.zeros(2, np.float32), np.zeros((3, 1), np.float32), np.zeros(6, np.float32)],
)
def test_advantages_that_do_not_fit_the_groups_are_an_error(make_group: Callable[..., Group], advantages: Any):
    with pytest.raises(InputError, match=r"algorithm\.advantage.*one number a sample, \(3,\), or one a token, \(12,\)"):
        make_batch([make_group([1, 2, 3])], advantages)


def test_advantages_that_are_not_finite_name_their_group(make_group: Callable[..., Group]):
    group = make_group([1, 2], [float("nan"), 0.5], name="row:7@0")
    with pytest.raises(InputError, match=r"must be finite; the rewards of group row:7@0 are \[nan, 0\.5\]"):
        make_batch([group], grpo_of([group]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_mask": np.ones(5, np.bool_)}, "nothing predicts the first token"),
        ({"rollout_logprobs": np.zeros(4, np.float32)}, "must be equal"),
        ({"version_spans": ()}, "must say which weights"),
    ],
)
def test_a_sample_that_cannot_be_trained_on_is_an_error(
    make_sample: Callable[..., Sample], changes: dict[str, Any], message: str
):
    group = Group(Prompt("p", "x"), (make_sample(**changes),))
    with pytest.raises(ValueError, match=message):
        make_batch([group], np.zeros(1, np.float32))


def test_advantages_by_token_stay_where_they_are(make_group: Callable[..., Group]):
    group = make_group([1, 2])
    by_token = np.arange(7, dtype=np.float32)
    batch = make_batch([group], by_token)
    assert batch.advantages.tolist() == [0, 0, 2, 0, 0, 5, 6]  # two tokens of prompt each
    (first, second) = shard(batch, 2)
    assert sorted([first.advantages.tolist(), second.advantages.tolist()]) == [[0, 0, 2], [0, 0, 5, 6]]
    by_token[0] = np.nan  # outside loss_mask
    assert make_batch([group], by_token).advantages.tolist() == batch.advantages.tolist()


@given(steps())
def test_whole_groups_stay_on_one_rank(step: Step):
    shards = shard(step.batch, step.num_ranks, step.num_minibatches, whole_groups=True)
    assert sorted(row for part in shards for row in rows(part)) == sorted(rows(step.batch))
    for group in range(len(step.groups)):
        assert sum(group in part.group_index for part in shards) == 1


def test_columns_travel_with_their_tokens(make_sample: Callable[..., Sample]):
    def with_teacher(length: int) -> Sample:
        sample = make_sample(prompt_len=1, response_len=length)
        return sample.replace(columns={"teacher_logprobs": -np.arange(length + 1, dtype=np.float32)})

    groups = [Group(Prompt("a", "x"), (with_teacher(1), with_teacher(3)))]
    columns = sample_columns(groups, ["teacher_logprobs"]) | {"staleness": staleness(groups, 5)}
    batch = make_batch(groups, grpo_of(groups), columns=columns)
    assert batch.columns["teacher_logprobs"].tolist() == [0, -1, 0, -1, -2, -3]
    assert batch.columns["staleness"].tolist() == [0, 2, 0, 2, 2, 2]  # sampled by version 3
    assert batch.take([1]).columns["teacher_logprobs"].tolist() == [0, -1, -2, -3]


def test_a_column_that_a_sample_lacks_is_an_error(make_group: Callable[..., Group]):
    with pytest.raises(InputError, match=r"ref_logprobs.*generate function"):
        sample_columns([make_group([1])], ["ref_logprobs"])


def test_a_reduction_must_give_a_weight_a_sample(make_group: Callable[..., Group]):
    group = make_group([1, 2])
    with pytest.raises(InputError, match=r"algorithm\.reduction.*one finite weight a sample"):
        make_batch([group], grpo_of([group]), lambda num_tokens, group_index: np.array([0.5]))
    with pytest.raises(InputError, match=r"algorithm\.reduction"):
        make_batch([group], grpo_of([group]), lambda num_tokens, group_index: np.array([0.5, np.inf]))
