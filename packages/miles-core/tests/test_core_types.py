import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import Batch, Group, Prompt, Sample, VersionSpan


def three_tokens() -> Sample:
    """The worked example of the module's docstring."""
    return Sample(
        tokens=np.array([7, 9, 4], np.int32),
        loss_mask=np.array([False, False, True]),
        rollout_logprobs=np.array([0, 0, -0.7], np.float32),
        version_spans=(VersionSpan(2, 3, 5),),
        finish_reason="stop",
    )


def batch_of(lengths: list[int]) -> Batch:
    total, n = sum(lengths), len(lengths)
    return Batch(
        tokens=np.arange(total, dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        loss_mask=np.ones(total, np.bool_),
        rollout_logprobs=-np.arange(total, dtype=np.float32),
        advantages=np.arange(total, dtype=np.float32) * 2,
        loss_weights=np.full(total, 1 / max(total, 1), np.float32),
        rewards=np.arange(n, dtype=np.float32),
        versions=np.arange(n, dtype=np.int64),
        group_index=np.arange(n, dtype=np.int32),
        num_loss_tokens=total,
        num_samples=n,
    )


def test_the_worked_example():
    sample = three_tokens()
    assert sample.response_len == 1
    assert sample.oldest_version == 5
    assert np.isnan(sample.reward)


def test_oldest_version_is_the_minimum_over_spans_and_samples():
    spans = (VersionSpan(1, 2, 7), VersionSpan(2, 3, 4))
    old = three_tokens().replace(version_spans=spans)
    assert old.oldest_version == 4
    assert Group(Prompt("p", "x"), (three_tokens(), old)).oldest_version == 4


def test_replace_leaves_the_original_alone():
    sample = three_tokens()
    changed = sample.replace(reward=1.0)
    assert changed.reward == 1.0 and np.isnan(sample.reward)
    assert changed.tokens is sample.tokens


def test_samples_are_frozen():
    with pytest.raises(AttributeError):
        three_tokens().reward = 1.0  # type: ignore[misc]


def test_group_answers_with_its_prompts_id_and_its_rewards():
    group = Group(Prompt("row:3@0", "x"), (three_tokens().replace(reward=1), three_tokens().replace(reward=0)))
    assert group.id == "row:3@0"
    assert group.rewards.dtype == np.float32 and group.rewards.tolist() == [1, 0]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans())
def test_a_pickled_group_comes_back_bit_by_bit(lengths: list[int], with_experts: bool):
    samples = tuple(
        Sample(
            tokens=np.arange(n, dtype=np.int32) + 10 * i,
            loss_mask=np.arange(n) >= 1,
            rollout_logprobs=np.linspace(-1, 0, n, dtype=np.float32),
            version_spans=(VersionSpan(0, 1, i), VersionSpan(1, n, i + 1)),
            finish_reason="length",
            text=f"sample {i}",
            reward=i / 3,
            reward_parts={"exact": float(i)},
            metadata={"i": [i]},
            routed_experts=np.full((n - 1, 2, 2), i, np.uint8) if with_experts else None,
        )
        for i, n in enumerate(lengths)
    )
    group = Group(Prompt("p", [{"role": "user", "content": "x"}], {"answer": "4"}), samples)
    back: Group = pickle.loads(pickle.dumps(group))
    assert (back.prompt.id, back.prompt.content, back.prompt.metadata) == ("p", group.prompt.content, {"answer": "4"})
    for one, other in zip(samples, back.samples, strict=True):
        for name in Sample.__slots__:
            left, right = getattr(one, name), getattr(other, name)
            if isinstance(left, np.ndarray):
                assert left.dtype == right.dtype and left.tobytes() == right.tobytes()
            else:
                assert left == right and type(left) is type(right)
        assert all(isinstance(span, VersionSpan) for span in other.version_spans)


def test_offsets_say_where_samples_start_and_the_last_ends():
    assert batch_of([2, 0, 3]).offsets.tolist() == [0, 2, 2, 5]
    assert batch_of([]).offsets.tolist() == [0]


@given(st.lists(st.integers(0, 5), max_size=6).flatmap(lambda n: st.tuples(st.just(n), st.permutations(range(len(n))))))
def test_taking_samples_one_by_one_and_all_at_once_is_the_same(drawn: tuple[list[int], list[int]]):
    lengths, order = drawn
    batch = batch_of(lengths)
    taken = batch.take(order)
    singles = [batch.take([i]) for i in order]
    for name in ("tokens", "loss_mask", "rollout_logprobs", "advantages", "loss_weights", "lengths", "rewards"):
        column = getattr(taken, name)
        assert column.dtype == getattr(batch, name).dtype
        assert column.tolist() == [value for single in singles for value in getattr(single, name).tolist()]
    assert (taken.num_loss_tokens, taken.num_samples) == (batch.num_loss_tokens, batch.num_samples)


def test_taking_nothing_gives_an_empty_batch():
    empty = batch_of([2, 3]).take([])
    assert len(empty.tokens) == len(empty.lengths) == 0
    assert empty.tokens.dtype == np.int32
