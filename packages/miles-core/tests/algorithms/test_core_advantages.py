"""Estimators against the recursions of their papers, written out one token at a time, and the laws that they keep."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from miles_core.algorithms.advantages import (
    EPS,
    AdvantageInputs,
    dr_grpo,
    gae,
    gdpo,
    grpo,
    preference,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    with_kl_penalty,
)
from miles_core.algorithms.kl import k1, k3
from miles_core.algorithms.needs import needs_of

GROUPS = st.lists(st.lists(st.integers(-20, 20), min_size=1, max_size=6), min_size=1, max_size=4)
BY_SAMPLE = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce": reinforce, "preference": preference}
BY_TOKEN = {"reinforce_plus_plus": reinforce_plus_plus, "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline}


def of(rewards: ArrayLike, mask: list[list[int]], **columns: Any) -> AdvantageInputs:
    """Samples of one group, given a row of the mask and of each column per sample."""
    rows = [np.asarray(row, np.bool_) for row in mask]
    flat = {name: np.concatenate([np.asarray(row, np.float32) for row in rows_]) for name, rows_ in columns.items()}
    return AdvantageInputs(
        rewards=np.asarray(rewards, np.float32),
        group_index=np.zeros(len(rows), np.int32),
        lengths=np.array([len(row) for row in rows], np.int32),
        loss_mask=np.concatenate(rows),
        **flat,
    )


@st.composite
def steps(draw: Any) -> AdvantageInputs:
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_samples = sum(sizes)
    lengths = rng.integers(1, 8, num_samples).astype(np.int32)
    total = int(lengths.sum())
    names = ("token_rewards", "rollout_logprobs", "ref_logprobs", "values")
    return AdvantageInputs(
        rewards=rng.normal(size=num_samples).astype(np.float32),
        group_index=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        lengths=lengths,
        loss_mask=rng.random(total) < 0.6,
        reward_parts={name: rng.normal(size=num_samples).astype(np.float32) for name in "ab"},
        **{name: rng.normal(size=total).astype(np.float32) for name in names},
    )


def test_rewards_by_hand():
    groups = AdvantageInputs.of_rewards([[1, 0, 0, 1], [2, 5]])
    assert dr_grpo(groups).tolist() == [0.5, -0.5, -0.5, 0.5, -1.5, 1.5]
    assert rloo(groups).tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, -3, 3])
    assert reinforce(groups).tolist() == [1, 0, 0, 1, 2, 5]
    assert reinforce(groups, baseline=True).tolist() == [-0.5, -1.5, -1.5, -0.5, 0.5, 3.5]
    assert preference(groups).tolist() == [1, -1, 0, 0, -1, 1]
    assert preference(AdvantageInputs.of_rewards([[2, 2]])).tolist() == [0, 0]


@given(GROUPS)
def test_rloo_is_dr_grpo_scaled_by_n_over_n_minus_1(groups: list[list[int]]):
    inputs = AdvantageInputs.of_rewards(groups)
    sizes = np.concatenate([np.full(len(group), len(group)) for group in groups])
    scale = np.where(sizes > 1, sizes / np.maximum(sizes - 1, 1), 1)
    np.testing.assert_allclose(rloo(inputs), scale * dr_grpo(inputs), rtol=1e-6)
    others = [
        np.mean([r for j, r in enumerate(group) if j != i] or [group[i]]) for group in groups for i in range(len(group))
    ]
    np.testing.assert_allclose(rloo(inputs), inputs.rewards - others, rtol=1e-5, atol=1e-5)


@given(GROUPS)
def test_grpo_is_dr_grpo_divided_by_the_deviation(groups: list[list[int]]):
    inputs = AdvantageInputs.of_rewards(groups)
    np.testing.assert_array_equal(grpo(inputs, normalize_std=False), dr_grpo(inputs))
    deviations = [np.std(group, ddof=1) + EPS if len(group) > 1 else 1.0 for group in groups for _ in group]
    np.testing.assert_allclose(grpo(inputs), dr_grpo(inputs) / deviations, rtol=1e-5, atol=1e-6)


def test_reinforce_plus_plus_by_hand():
    # Returns to go [1, 1, 1] and [0, 0]: mean 0.6, unbiased variance 0.3.
    inputs = of([1, 0], [[0, 1, 1, 1], [0, 1, 1]])
    expected = np.array([0, 0.4, 0.4, 0.4, 0, -0.6, -0.6]) / np.sqrt(0.3 + 1e-8)
    np.testing.assert_allclose(reinforce_plus_plus(inputs), expected, rtol=1e-6)
    halved = np.array([0.25, 0.5, 1, 0, 0])
    expected = (halved - halved.mean()) / np.sqrt(halved.var(ddof=1) + 1e-8)
    found = reinforce_plus_plus(inputs, gamma=0.5)[inputs.loss_mask]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_reinforce_plus_plus_baseline_by_hand():
    inputs = of([1, 0], [[0, 1, 1, 1], [0, 1]])
    spread = np.array([0.5, 0.5, 0.5, -0.5])
    expected = (spread - spread.mean()) / np.sqrt(spread.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(reinforce_plus_plus_baseline(inputs)[inputs.loss_mask], expected, rtol=1e-6)


def slow_gae(rewards: Any, values: Any, mask: Any, gamma: float, lam: float) -> np.ndarray:
    """One sample, token by token from its end; tokens outside the mask neither change nor add anything."""
    advantages, following, next_value = np.zeros(len(mask)), 0.0, 0.0
    for t in reversed(range(len(mask))):
        if mask[t]:
            delta = rewards[t] + gamma * next_value - values[t]
            following = delta + gamma * lam * following
            advantages[t], next_value = following, values[t]
    return advantages


def test_gae_by_hand():
    inputs = of([1], [[0, 1, 1]], values=[[9, 0.5, 0.25]])
    advantages, returns = gae(inputs, gamma=0.9, lam=0.5, normalize=False)
    last = 1 - 0.25
    first = 0.9 * 0.25 - 0.5 + 0.45 * last
    assert advantages.tolist() == pytest.approx([0, first, last])
    assert returns[inputs.loss_mask].tolist() == pytest.approx([first + 0.5, 1])


@given(steps(), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_recursion_and_tools_do_not_interrupt_it(inputs: AdvantageInputs, gamma: float, lam: float):
    by_token = inputs.rewards_by_token()
    ends = np.cumsum(inputs.lengths)
    expected = np.concatenate(
        [
            slow_gae(by_token[a:b], inputs.column("values")[a:b], inputs.loss_mask[a:b], gamma, lam)
            for a, b in zip(ends - inputs.lengths, ends, strict=True)
        ]
    )
    advantages, returns = gae(inputs, gamma=gamma, lam=lam, normalize=False)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, expected + inputs.column("values"), rtol=1e-5, atol=1e-6)
    whitened, same = gae(inputs, gamma=gamma, lam=lam)
    np.testing.assert_array_equal(same, returns)
    assert not whitened[~inputs.loss_mask].any()
    if inputs.loss_mask.sum() > 1:
        chosen = expected[inputs.loss_mask]
        wanted = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(whitened[inputs.loss_mask], wanted, rtol=1e-3, atol=1e-3)


@given(steps())
def test_with_lambda_1_returns_are_rewards_to_go(inputs: AdvantageInputs):
    returns = gae(inputs, gamma=1, lam=1, normalize=False).returns
    ends = np.cumsum(inputs.lengths)
    by_token = np.where(inputs.loss_mask, inputs.rewards_by_token(), 0)
    for a, b in zip(ends - inputs.lengths, ends, strict=True):
        to_go = np.cumsum(by_token[a:b][::-1])[::-1]
        np.testing.assert_allclose(returns[a:b][inputs.loss_mask[a:b]], to_go[inputs.loss_mask[a:b]], atol=1e-5)


def test_gae_without_a_critic_says_so():
    assert needs_of(gae) == {"values"}
    with pytest.raises(ValueError, match=r"inputs\.values is None"):
        gae(of([1], [[0, 1]]))


def test_gdpo_by_hand():
    parts = {"right": np.array([1, 0, 1, 1], np.float32), "short": np.array([0, 10, 0, 0], np.float32)}
    groups = AdvantageInputs.of_rewards([[1, 10], [1, 1]]).replace(reward_parts=parts)
    unit = 0.5 / (np.sqrt(0.5) + EPS)
    summed = np.array([unit - 0.5 * 5 / (np.sqrt(50) + EPS), -unit + 0.5 * 5 / (np.sqrt(50) + EPS), 0, 0])
    expected = (summed - summed.mean()) / (summed.std(ddof=1) + EPS)
    np.testing.assert_allclose(gdpo(groups, weights={"right": 1.0, "short": 0.5}), expected, rtol=1e-5)


@given(steps())
def test_gdpo_does_not_see_the_scale_of_a_part(inputs: AdvantageInputs):
    scaled = inputs.replace(reward_parts=inputs.reward_parts | {"b": 64 * inputs.reward_parts["b"]})
    weights = {"a": 1.0, "b": 0.25}  # equal ones may cancel, and then EPS is all that is left
    np.testing.assert_allclose(gdpo(scaled, weights=weights), gdpo(inputs, weights=weights), rtol=1e-2, atol=1e-2)
    assert abs(gdpo(inputs).mean()) < 1e-5


def test_gdpo_names_the_part_that_is_missing():
    inputs = AdvantageInputs.of_rewards([[1, 2]])
    with pytest.raises(ValueError, match="needs named parts"):
        gdpo(inputs)
    parts = {"a": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match=r"it has \['a'\], and \['b'\] is missing"):
        gdpo(inputs.replace(reward_parts=parts), weights={"b": 1.0})


def test_a_kl_penalty_by_hand():
    logprobs, reference = [[0, -1, -2]], [[0, -1.5, -1]]
    inputs = of([1], [[0, 1, 1]], rollout_logprobs=logprobs, ref_logprobs=reference)
    penalised = with_kl_penalty(inputs, k1, 0.1)
    assert penalised.token_rewards is not None
    assert penalised.token_rewards.tolist() == pytest.approx([0, -0.05, 0.1])
    assert penalised.rewards_by_token().tolist() == pytest.approx([0, -0.05, 1.1])
    assert penalised.totals.tolist() == pytest.approx([1.05])
    twice = with_kl_penalty(penalised, k1, 0.1)
    assert twice.totals.tolist() == pytest.approx([1.1])
    assert with_kl_penalty(inputs, k3, 0.1).totals[0] == pytest.approx(
        1 - 0.1 * (np.exp(-0.5) + 0.5 - 1 + np.exp(1) - 1 - 1)
    )


@pytest.mark.parametrize("name", [*BY_SAMPLE, *BY_TOKEN, "gae", "gdpo"])
@given(inputs=steps())
def test_values_outside_the_mask_never_matter(name: str, inputs: AdvantageInputs):
    estimator = (BY_SAMPLE | BY_TOKEN | {"gae": gae, "gdpo": gdpo})[name]

    def outcome(given_inputs: AdvantageInputs) -> Any:
        found = estimator(with_kl_penalty(given_inputs, k1, 0.1))
        return found.advantages if name == "gae" else found

    spoiled = {
        column: np.where(inputs.loss_mask, getattr(inputs, column), np.float32("nan"))
        for column in ("token_rewards", "rollout_logprobs", "ref_logprobs", "values")
    }
    expected = outcome(inputs)
    assert expected.dtype == np.float32
    assert expected.shape == (inputs.lengths if name in {*BY_SAMPLE, "gdpo"} else inputs.loss_mask).shape
    np.testing.assert_array_equal(outcome(inputs.replace(**spoiled)), expected)


@pytest.mark.parametrize("name", [*BY_SAMPLE, *BY_TOKEN, "gdpo"])
@given(inputs=steps(), seed=st.integers(0, 100))
def test_they_follow_their_samples_in_any_order(name: str, inputs: AdvantageInputs, seed: int):
    estimator = (BY_SAMPLE | BY_TOKEN | {"gdpo": gdpo})[name]
    order = np.random.default_rng(seed).permutation(len(inputs.lengths))
    starts = np.cumsum(inputs.lengths) - inputs.lengths
    tokens = np.concatenate([np.arange(starts[i], starts[i] + inputs.lengths[i]) for i in order])
    names = ("token_rewards", "loss_mask")
    shuffled = inputs.replace(
        **{column: getattr(inputs, column)[order] for column in ("rewards", "group_index", "lengths")},
        **{column: getattr(inputs, column)[tokens] for column in names},
        reward_parts={part: values[order] for part, values in inputs.reward_parts.items()},
    )
    expected = estimator(inputs)[order if name in {*BY_SAMPLE, "gdpo"} else tokens]
    np.testing.assert_allclose(estimator(shuffled), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "reinforce"])
@given(inputs=steps())
def test_unnormalised_ones_scale_with_the_rewards(name: str, inputs: AdvantageInputs):
    assert inputs.token_rewards is not None
    scaled = inputs.replace(rewards=4 * inputs.rewards, token_rewards=4 * inputs.token_rewards)
    np.testing.assert_allclose(BY_SAMPLE[name](scaled), 4 * BY_SAMPLE[name](inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BY_TOKEN)
@given(inputs=steps())
def test_whitened_ones_have_mean_0_and_do_not_scale(name: str, inputs: AdvantageInputs):
    assert inputs.token_rewards is not None
    scaled = inputs.replace(rewards=4 * inputs.rewards, token_rewards=4 * inputs.token_rewards)
    found = BY_TOKEN[name](inputs)
    np.testing.assert_allclose(BY_TOKEN[name](scaled), found, rtol=1e-2, atol=1e-2)
    assert not inputs.loss_mask.any() or abs(found[inputs.loss_mask].mean()) < 1e-4
