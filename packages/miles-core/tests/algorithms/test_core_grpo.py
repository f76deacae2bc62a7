import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from miles_core.algorithms.advantages import EPS, AdvantageInputs, grpo

REWARDS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=16)


def advantages(rewards: list[float], normalize_std: bool = True) -> NDArray[np.float32]:
    return grpo(AdvantageInputs.of_rewards([rewards]), normalize_std=normalize_std)


def test_a_hand_worked_group():
    # mean 0.5; squares 4 * 0.25 = 1; unbiased variance 1 / 3
    std = (1 / 3) ** 0.5
    expected = np.array([0.5, -0.5, -0.5, 0.5]) / (std + EPS)
    np.testing.assert_allclose(advantages([1, 0, 0, 1]), expected, rtol=1e-6)
    assert advantages([1, 0, 0, 1], normalize_std=False).tolist() == [0.5, -0.5, -0.5, 0.5]


def test_groups_are_independent_and_may_differ_in_size():
    together = grpo(AdvantageInputs.of_rewards([[0, 1], [3, 5, 10]]))
    assert together.shape == (5,)
    assert together.tolist() == [*advantages([0, 1]).tolist(), *advantages([3, 5, 10]).tolist()]
    assert grpo(AdvantageInputs.of_rewards([])).shape == (0,)


@given(st.floats(-100, 100, width=32), st.integers(1, 64), st.booleans())
def test_a_group_of_equal_rewards_gives_exact_zeros(reward: float, size: int, normalize_std: bool):
    assert not advantages([reward] * size, normalize_std).any()


@given(REWARDS, st.booleans())
def test_they_are_float32_and_sum_to_zero(rewards: list[float], normalize_std: bool):
    result = advantages(rewards, normalize_std)
    assert result.dtype == np.float32
    assert abs(result.sum(dtype=np.float64)) <= 1e-5 * max(1, np.abs(result).max()) * len(rewards)


@given(REWARDS.flatmap(lambda r: st.tuples(st.just(r), st.permutations(range(len(r))))), st.booleans())
def test_they_follow_their_samples_under_permutation(drawn: tuple[list[float], list[int]], normalize_std: bool):
    rewards, order = drawn
    shuffled = advantages([rewards[i] for i in order], normalize_std)
    scale = np.abs(rewards).max() + 1  # sums in another order round differently
    tolerance = 1e-12 * scale / (EPS if normalize_std else 1) + 1e-6
    np.testing.assert_allclose(shuffled, advantages(rewards, normalize_std)[order], rtol=1e-5, atol=tolerance)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=16), st.integers(-1000, 1000), st.booleans())
def test_a_shift_of_all_rewards_changes_nothing(rewards: list[int], shift: int, normalize_std: bool):
    shifted = advantages([float(r + shift) for r in rewards], normalize_std)
    np.testing.assert_allclose(shifted, advantages([float(r) for r in rewards], normalize_std), rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=16), st.sampled_from([0.5, 2.0, 8.0]))
def test_a_scale_counts_only_without_the_division_by_the_std(rewards: list[int], scale: float):
    plain, scaled = [float(r) for r in rewards], [r * scale for r in rewards]
    np.testing.assert_allclose(advantages(scaled, False), scale * advantages(plain, False), rtol=1e-6)
    np.testing.assert_allclose(advantages(scaled), advantages(plain), rtol=1e-4, atol=1e-6)  # up to EPS


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=16).filter(lambda r: len(set(r)) > 1))
def test_the_division_makes_the_std_one(rewards: list[int]):
    assert np.std(advantages([float(r) for r in rewards]), ddof=1) == pytest.approx(1, rel=1e-4)


def test_one_sample_has_nothing_to_compare_with():
    assert advantages([7.0]).tolist() == [0.0]
