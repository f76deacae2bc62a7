import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_core.algorithms.losses import LossInputs, PPOClip

torch.set_num_threads(1)


def inputs(ratios: list[float], advantages: list[float]) -> LossInputs:
    size = len(ratios)
    old = torch.linspace(-2, -0.1, size)
    return LossInputs(
        logprobs=(old.double() + torch.tensor(ratios).double().log()).requires_grad_(),
        old_logprobs=old.double(),
        rollout_logprobs=old.double(),
        advantages=torch.tensor(advantages).double(),
        loss_mask=torch.ones(size, dtype=torch.bool),
        sample_index=torch.zeros(size, dtype=torch.long),
    )


# ratio, advantage, loss, gradient of the loss by logprobs (d ratio / d logprobs = ratio); the clip is at 0.8 and 1.28
WORKED = [
    (1.0, 2.0, -2.0, -2.0),  # on policy: the plain policy gradient
    (1.0, -2.0, 2.0, 2.0),
    (1.1, 1.0, -1.1, -1.1),  # inside the bounds
    (0.9, -1.0, 0.9, 0.9),
    (1.5, 1.0, -1.28, 0.0),  # gained enough: cut
    (0.5, -1.0, 0.8, 0.0),  # lost enough: cut
    (0.5, 1.0, -0.5, -0.5),  # moved the wrong way: no bound
    (1.5, -1.0, 1.5, 1.5),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), WORKED)
def test_values_and_gradients_by_hand(ratio: float, advantage: float, loss: float, gradient: float):
    given_inputs = inputs([ratio], [advantage])
    losses, _ = PPOClip()(given_inputs)
    assert losses.item() == pytest.approx(loss, abs=1e-7)
    losses.sum().backward()
    assert given_inputs.logprobs.grad is not None
    assert given_inputs.logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_clip_fractions_count_the_tokens_that_the_clip_stops():
    _, metrics = PPOClip()(inputs([1.5, 1.5, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 1.0]))
    assert metrics["clip_fraction_high"].tolist() == [1, 0, 0, 0, 0]
    assert metrics["clip_fraction_low"].tolist() == [0, 0, 0, 1, 0]
    assert metrics["ratio"].tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5, 1.0])
    assert not any(value.requires_grad for value in metrics.values())


@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(-3, 3)), min_size=1, max_size=8),
    st.floats(0.05, 1),
    st.floats(0.05, 2),
)
def test_it_is_the_formula_and_a_bound_from_above(tokens: list[tuple[float, float]], low: float, high: float):
    ratios, advantages = zip(*tokens, strict=True)
    losses, metrics = PPOClip(clip_low=low, clip_high=high)(inputs(list(ratios), list(advantages)))
    for loss, ratio, (_, advantage) in zip(losses.tolist(), metrics["ratio"].tolist(), tokens, strict=True):
        advantage = float(torch.tensor(advantage))
        clipped = min(max(ratio, 1 - low), 1 + high)
        assert math.isclose(loss, -min(ratio * advantage, clipped * advantage), abs_tol=1e-9)
        assert loss >= -ratio * advantage - 1e-9  # pessimistic: never better than without the clip


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(-3, 3)), min_size=2, max_size=8))
def test_tokens_do_not_touch_each_other(tokens: list[tuple[float, float]]):
    ratios, advantages = zip(*tokens, strict=True)
    together, _ = PPOClip()(inputs(list(ratios), list(advantages)))
    reversed_, _ = PPOClip()(inputs(list(ratios[::-1]), list(advantages[::-1])))
    assert together.tolist() == pytest.approx(reversed_.tolist()[::-1])


@pytest.mark.parametrize("bounds", [{"clip_low": 0}, {"clip_low": 1.5}, {"clip_low": -0.1}, {"clip_high": 0}])
def test_bounds_that_are_none_are_refused(bounds: dict[str, float]):
    (name,) = bounds
    with pytest.raises(ValueError, match=f"{name}="):
        PPOClip(**bounds)
