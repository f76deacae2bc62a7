"""Every loss against its formula by hand, and the laws that all of them keep."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from miles_core import HookSpec
from miles_core.algorithms.corrections import MIS, TIS, IcePop, rollout_ratio
from miles_core.algorithms.kl import k1, k2, k3
from miles_core.algorithms.losses import (
    CISPO,
    DPO,
    GSPO,
    SAPO,
    Distillation,
    KLTerm,
    LossInputs,
    Objective,
    PPOClip,
    ValueClip,
    policy_gradient,
    sft,
)
from miles_core.algorithms.losses.build import build_loss
from miles_core.algorithms.needs import needs_of
from miles_core.config import AlgorithmSection

torch.set_num_threads(1)

LOSSES: dict[str, Callable[[LossInputs], Any]] = {
    "ppo_clip": PPOClip(),
    "dual_clip": PPOClip(dual_clip=3.0),
    "gspo": GSPO(0.2, 0.2),
    "gspo_token": GSPO(0.2, 0.2, by_token=True),
    "cispo": CISPO(),
    "sapo": SAPO(),
    "policy_gradient": policy_gradient,
    "sft": sft,
    "dpo": DPO(),
    "distillation": Distillation(),
    "value_clip": ValueClip(),
    "all": Objective(
        PPOClip(), (TIS(), MIS("sequence"), IcePop("geometric")), KLTerm(0.1, k3, "importance"), entropy_coef=0.01
    ),
    **{f"kl_{name}": Objective(PPOClip(), kl=KLTerm(0.1, k3, name)) for name in ("own", "k2", "importance")},
    **{f"tis_{level}": Objective(PPOClip(), (TIS(level),)) for level in ("token", "sequence", "geometric")},
}
CHOSEN, REJECTED = 1.0, -1.0


def make_inputs(seed: int = 0, lengths: tuple[int, ...] = (4, 3, 5, 2)) -> LossInputs:
    """Samples of which every second is chosen and the next one rejected; float64."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)

    def column(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(total, generator=generator, dtype=torch.float64)

    sample_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    logprobs = -column().abs()
    loss_mask = torch.rand(total, generator=generator) < 0.7
    starts = torch.tensor([0, *np.cumsum(lengths)[:-1]])
    loss_mask[starts], loss_mask[starts + 1] = False, True
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=logprobs + column(0.3),
        rollout_logprobs=logprobs + column(0.3),
        advantages=column().abs() * torch.where(sample_index % 2 == 0, CHOSEN, REJECTED),
        loss_mask=loss_mask,
        sample_index=sample_index,
        entropy=column().abs().requires_grad_(),
        ref_logprobs=logprobs + column(0.3),
        teacher_logprobs=logprobs + column(0.3),
        values=column().requires_grad_(),
        old_values=column(),
        returns=column(),
        staleness=torch.zeros(total),
        group_index=sample_index // 2,
    )


def columns_of(inputs: LossInputs) -> dict[str, Tensor]:
    return {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}


def rearranged(inputs: LossInputs, order: Tensor) -> LossInputs:
    columns = {name: column.detach()[order] for name, column in columns_of(inputs).items()}
    for name in ("logprobs", "entropy", "values"):
        columns[name].requires_grad_()
    return LossInputs(**columns)


def gradients(loss: Any, inputs: LossInputs, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Of the weighted sum over loss_mask, as the trainer takes it."""
    per_token, _ = loss(inputs)
    weights = torch.ones_like(per_token) if weights is None else weights
    leaves = {name: getattr(inputs, name) for name in ("logprobs", "entropy", "values")}
    total = (weights * per_token).masked_fill(~inputs.loss_mask, 0).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros(1) if one is None else one for name, one in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("name", LOSSES)
def test_values_outside_the_mask_never_matter(name: str):
    loss, inputs = LOSSES[name], make_inputs()
    outside = ~inputs.loss_mask
    spoiled = {}
    for key, column in columns_of(inputs).items():
        if column.dtype == torch.float64:
            spoiled[key] = torch.where(outside, torch.nan, column.detach()).requires_grad_(column.requires_grad)
    other = dataclasses.replace(inputs, **spoiled)
    expected, metrics = loss(inputs)
    found, found_metrics = loss(other)
    torch.testing.assert_close(found[inputs.loss_mask], expected[inputs.loss_mask], rtol=0, atol=0)
    assert metrics.keys() == found_metrics.keys()
    for key, column in metrics.items():
        assert not column.requires_grad and column.shape == expected.shape
        assert torch.equal(column[inputs.loss_mask], found_metrics[key][inputs.loss_mask])
    before, after = gradients(loss, inputs), gradients(loss, other)
    for key, gradient in after.items():
        assert torch.equal(gradient, before[key]), key
        if len(gradient) > 1:
            assert not gradient[outside].any()


@pytest.mark.parametrize("name", LOSSES)
def test_samples_may_come_in_any_order_and_company(name: str):
    """What packing, micro-batches and context parallelism rely on."""
    loss, inputs = LOSSES[name], make_inputs()
    expected = loss(inputs)[0].detach()
    flipped = torch.cat([torch.nonzero(inputs.group_index == group)[:, 0] for group in (1, 0)])
    torch.testing.assert_close(loss(rearranged(inputs, flipped))[0].detach(), expected[flipped])
    for group in (0, 1):
        alone = torch.nonzero(inputs.group_index == group)[:, 0]
        part = rearranged(inputs, alone)
        part = dataclasses.replace(part, sample_index=part.sample_index % 2, group_index=part.group_index * 0)
        torch.testing.assert_close(loss(part)[0].detach(), expected[alone])


@pytest.mark.parametrize("name", LOSSES)
def test_a_micro_batch_without_trained_tokens_gives_zeros_and_the_same_metrics(name: str):
    inputs = make_inputs()
    empty = dataclasses.replace(inputs, loss_mask=torch.zeros_like(inputs.loss_mask))
    per_token, metrics = LOSSES[name](empty)
    assert metrics.keys() == LOSSES[name](inputs)[1].keys()
    assert all(not gradient.any() for gradient in gradients(LOSSES[name], empty).values())
    assert per_token.isfinite().all()


@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip", "gspo", "gspo_token", "cispo", "sapo", "policy_gradient"])
@given(factor=st.sampled_from([0.25, 2.0, 8.0]), seed=st.integers(0, 5))
def test_losses_are_linear_in_the_advantages(name: str, factor: float, seed: int):
    inputs = make_inputs(seed)
    scaled = dataclasses.replace(inputs, advantages=factor * inputs.advantages)
    torch.testing.assert_close(LOSSES[name](scaled)[0], factor * LOSSES[name](inputs)[0])


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gspo_token", "cispo", "sapo"])
def test_on_policy_each_is_the_policy_gradient(name: str):
    inputs = make_inputs()
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach().clone())
    share = 1 / inputs.sample_sum(torch.ones_like(inputs.advantages))  # of a sample's tokens
    constant = dataclasses.replace(inputs, advantages=inputs.sample_mean(inputs.advantages))
    expected = gradients(policy_gradient, constant, share)["logprobs"]
    torch.testing.assert_close(gradients(LOSSES[name], constant, share)["logprobs"], expected)


def one_token(ratio: float, advantage: float = 1.0, **more: Any) -> LossInputs:
    old = torch.tensor([-1.0], dtype=torch.float64)
    columns = {name: torch.tensor([value], dtype=torch.float64) for name, value in more.items()}
    return LossInputs(
        logprobs=(old + math.log(ratio)).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=columns.pop("rollout_logprobs", old),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        loss_mask=torch.tensor([True]),
        sample_index=torch.tensor([0]),
        **columns,
    )


@pytest.mark.parametrize(
    ("loss", "ratio", "advantage", "value", "gradient"),
    [
        (PPOClip(dual_clip=3.0), 4.0, -1.0, 3.0, 0.0),
        (PPOClip(dual_clip=3.0), 2.0, -1.0, 2.0, 2.0),
        (PPOClip(dual_clip=3.0), 4.0, 1.0, -1.28, 0.0),  # positive advantages know no dual clip
        (CISPO(clip_low=0.2, clip_high=0.28), 2.0, 1.0, -1.28 * (math.log(2) - 1), -1.28),
        (CISPO(clip_low=0.2, clip_high=0.28), 0.5, -1.0, 0.8 * (math.log(0.5) - 1), 0.8),
        (CISPO(), 0.01, 1.0, -0.01 * (math.log(0.01) - 1), -0.01),
        (SAPO(), 1.0, 2.0, -4.0, -2.0),  # sigmoid(0) * 4 * A; its slope is A
        (SAPO(), 3.0, 1.0, -4 / (1 + math.exp(-2)), -4 * 3 * math.exp(-2) / (1 + math.exp(-2)) ** 2),
        (SAPO(), 2.0, -1.0, 4 / 1.05 / (1 + math.exp(-1.05)), 4 * 2 * math.exp(-1.05) / (1 + math.exp(-1.05)) ** 2),
        (GSPO(), 1.1, 1.0, -1.0004, 0.0),
        (GSPO(), 1.1, -1.0, 1.1, 1.1),
        (policy_gradient, 1.0, 3.0, 3.0, -3.0),
        (sft, 1.0, 3.0, 1.0, -1.0),
    ],
)
def test_one_token_by_hand(loss: Any, ratio: float, advantage: float, value: float, gradient: float):
    inputs = one_token(ratio, advantage)
    found, _ = loss(inputs)
    assert found.item() == pytest.approx(value, rel=1e-12)
    found.sum().backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.item() == pytest.approx(gradient, rel=1e-12)


def test_gspo_takes_the_mean_log_ratio_over_trained_tokens():
    inputs = make_inputs(lengths=(3, 4))
    inputs = dataclasses.replace(
        inputs,
        logprobs=torch.tensor([9, -1, -2, 9, -1, -1, 9], dtype=torch.float64).requires_grad_(),
        old_logprobs=torch.tensor([0, -1.2, -2.4, 0, -0.9, -0.7, 0], dtype=torch.float64),
        loss_mask=torch.tensor([False, True, True, False, True, True, False]),
    )
    _, metrics = GSPO()(inputs)
    ratio = metrics["ratio"][inputs.loss_mask].tolist()
    assert ratio == pytest.approx([math.exp(0.3)] * 2 + [math.exp(-0.2)] * 2)


def test_gspo_and_gspo_token_have_equal_values_and_equal_gradients_for_equal_weights():
    inputs = make_inputs()
    one, other = GSPO(0.2, 0.2), GSPO(0.2, 0.2, by_token=True)
    assert torch.allclose(one(inputs)[0], other(inputs)[0])
    same = dataclasses.replace(inputs, advantages=inputs.sample_mean(inputs.advantages))
    weights = 1 / same.sample_sum(torch.ones_like(same.advantages)).clamp(min=1)
    expected = gradients(one, same, weights)["logprobs"]
    torch.testing.assert_close(gradients(other, same, weights)["logprobs"], expected)
    # All trained tokens of a sample get the same: s_i * A_i / |y_i|, where the clip does not stop it.
    for sample in range(4):
        chosen = expected[(same.sample_index == sample) & same.loss_mask]
        assert torch.allclose(chosen, chosen[0])


def test_dpo_by_hand_and_its_gradient():
    logprobs = torch.tensor([0, -1.0, -2.0, 0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0, -1.5, -2.5, 0, -2.0], dtype=torch.float64)
    inputs = dataclasses.replace(
        make_inputs(lengths=(3, 2)),
        logprobs=logprobs,
        ref_logprobs=reference,
        loss_mask=torch.tensor([False, True, True, False, True]),
    )
    losses, metrics = DPO(beta=0.5)(inputs)
    margin = 0.5 * ((0.5 + 0.5) - (-1.0))
    assert losses[inputs.loss_mask].tolist() == pytest.approx([math.log(1 + math.exp(-margin))] * 3)
    assert metrics["dpo_margin"][inputs.loss_mask].tolist() == pytest.approx([margin] * 3)
    weights = torch.tensor([0, 0.25, 0.25, 0, 0.5], dtype=torch.float64)  # "sample_mean" over the two
    pull = 0.5 / (1 + math.exp(margin))
    found = gradients(DPO(beta=0.5), inputs, weights)["logprobs"].tolist()
    assert found == pytest.approx([0, -pull, -pull, 0, pull])


def test_dpo_wants_one_chosen_and_one_rejected_sample():
    inputs = make_inputs()
    both_chosen = dataclasses.replace(inputs, advantages=inputs.advantages.abs())
    with pytest.raises(ValueError, match="2 chosen and 0 rejected samples"):
        DPO()(both_chosen)
    with pytest.raises(ValueError, match="group_index is None"):
        DPO()(dataclasses.replace(inputs, group_index=None))
    none = dataclasses.replace(inputs, advantages=torch.zeros_like(inputs.advantages))
    assert not DPO()(none)[0].any()  # groups without a pair take no part


def test_distillation_by_hand():
    inputs = one_token(1.5, teacher_logprobs=-2.0)
    losses, metrics = Distillation()(inputs)
    gap = math.log(1.5) - 1 + 2
    assert losses.item() == pytest.approx(1.5 * gap)
    assert metrics["teacher_kl"].item() == pytest.approx(gap)
    losses.sum().backward()
    assert inputs.logprobs.grad is not None and inputs.logprobs.grad.item() == pytest.approx(1.5 * gap)


def test_the_value_loss_by_hand():
    inputs = one_token(1.0, values=1.5, old_values=1.0, returns=2.0)
    losses, metrics = ValueClip(clip=0.2)(inputs)
    assert losses.item() == pytest.approx(0.5 * 0.8**2)  # (1.2 - 2)^2 is the larger error
    assert metrics["value_clip_fraction"].item() == 1
    inputs = one_token(1.0, values=3.0, old_values=1.0, returns=1.0)
    losses, metrics = ValueClip(clip=0.2)(inputs)
    assert losses.item() == pytest.approx(0.5 * 4) and metrics["value_clip_fraction"].item() == 0


@given(st.lists(st.tuples(st.floats(-5, 0), st.floats(-5, 0)), min_size=1, max_size=6))
def test_kl_estimators_by_their_formulas_in_numpy_and_torch(pairs: list[tuple[float, float]]):
    logprobs, reference = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    d = reference - logprobs
    expected = {k1: -d, k2: d**2 / 2, k3: torch.exp(d) - d - 1}
    for estimator, values in expected.items():
        torch.testing.assert_close(estimator(logprobs, reference), values)
        np.testing.assert_array_equal(estimator(logprobs.numpy(), reference.numpy()), estimator(logprobs, reference))
    assert (k3(logprobs, reference) >= 0).all()


def test_over_the_whole_vocabulary_estimators_are_the_kl_and_k2_and_importance_have_its_gradient():
    """Expectations over all tokens, weighted by the policy's own probabilities held fixed, as sampling does."""
    scores = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(scores, 0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (gradient,) = torch.autograd.grad(exact, scores, retain_graph=True)
    frozen = logprobs.detach().exp()
    inputs = LossInputs(
        logprobs, logprobs.detach(), logprobs.detach(), frozen, torch.ones(3, dtype=torch.bool), torch.arange(3),
        ref_logprobs=reference,
    )  # fmt: skip
    for estimator in (k1, k3):
        assert (frozen * estimator(logprobs, reference)).sum().item() == pytest.approx(exact.item())
        for kind in ("k2", "importance"):
            term, _ = KLTerm(1.0, estimator, kind)(inputs)
            assert (frozen * term).sum().item() == pytest.approx(exact.item())
            (found,) = torch.autograd.grad((frozen * term).sum(), scores, retain_graph=True)
            torch.testing.assert_close(found, gradient)
    (of_k1,) = torch.autograd.grad((frozen * k1(logprobs, reference)).sum(), scores, retain_graph=True)
    torch.testing.assert_close(of_k1, torch.zeros(3, dtype=torch.float64))  # k1 as a loss teaches nothing
    forward = (reference.exp() * (reference - logprobs)).sum()  # k3's is that of KL(reference || policy)
    (of_forward,) = torch.autograd.grad(forward, scores, retain_graph=True)
    (of_k3,) = torch.autograd.grad((frozen * k3(logprobs, reference)).sum(), scores, retain_graph=True)
    torch.testing.assert_close(of_k3, of_forward)


def test_k3_keeps_its_digits_near_zero():
    assert k3(np.float64(0.0), np.float64(1e-9)) == pytest.approx(5e-19, rel=1e-2)


def corrected(correction: Any) -> tuple[list[float], dict[str, list[float]]]:
    """Two samples: ratios by token 3 and 0.5; and 0.1 alone."""
    log = torch.tensor([0, 3.0, 0.5, 0, 0.1], dtype=torch.float64).log().nan_to_num(neginf=7.0)
    inputs = dataclasses.replace(
        make_inputs(lengths=(3, 2)),
        old_logprobs=torch.full((5,), -1.0, dtype=torch.float64),
        rollout_logprobs=-1.0 - log,
        loss_mask=torch.tensor([False, True, True, False, True]),
    )
    weights, metrics = correction(inputs)
    mask = inputs.loss_mask
    assert not weights.requires_grad
    return weights[mask].tolist(), {name: column[mask].tolist() for name, column in metrics.items()}


@pytest.mark.parametrize(
    ("correction", "weights", "flag", "flagged"),
    [
        (TIS(), [2, 0.5, 0.1], "tis_token_clipped", [1, 0, 0]),
        (TIS(lower=0.2), [2, 0.5, 0.2], "tis_token_clipped", [1, 0, 1]),
        (TIS("sequence", upper=1.2), [1.2, 1.2, 0.1], "tis_sequence_clipped", [1, 1, 0]),
        (TIS("geometric"), [1.5**0.5, 1.5**0.5, 0.1], "tis_geometric_clipped", [0, 0, 0]),
        (MIS(), [1.5, 1.5, 0.1], "mis_sequence_masked", [0, 0, 0]),
        (MIS(upper=1.4), [0, 0, 0.1], "mis_sequence_masked", [1, 1, 0]),
        (MIS("token"), [0, 0.5, 0.1], "mis_token_masked", [1, 0, 0]),
        (MIS("geometric", lower=0.5, weigh=False), [1, 1, 0], "mis_geometric_masked", [0, 0, 1]),
        (IcePop(), [3, 0.5, 0], "icepop_token_masked", [0, 0, 1]),
        (IcePop("sequence", 0.5, 1.25), [0, 0, 0], "icepop_sequence_masked", [1, 1, 1]),
        (IcePop("geometric", 0.5, 1.25), [1.5**0.5, 1.5**0.5, 0], "icepop_geometric_masked", [0, 0, 1]),
    ],
)
def test_corrections_by_hand(correction: Any, weights: list[float], flag: str, flagged: list[float]):
    found, metrics = corrected(correction)
    assert found == pytest.approx(weights)
    assert metrics[flag] == flagged
    assert metrics[flag.rpartition("_")[0] + "_weight"] == pytest.approx(weights)


@given(st.integers(0, 20))
def test_equal_models_need_no_correction(seed: int):
    inputs = make_inputs(seed)
    inputs = dataclasses.replace(inputs, rollout_logprobs=inputs.old_logprobs.clone())
    for correction in (TIS(), MIS(), IcePop(), TIS("sequence"), IcePop("geometric")):
        weights, _ = correction(inputs)
        assert torch.equal(weights, torch.ones_like(weights))


def test_sums_of_long_samples_do_not_overflow():
    inputs = dataclasses.replace(
        make_inputs(lengths=(500,)),
        old_logprobs=torch.zeros(500, dtype=torch.float64),
        rollout_logprobs=torch.full((500,), -10.0, dtype=torch.float64),
    )
    assert rollout_ratio(inputs, "sequence").isfinite().all()


@pytest.mark.parametrize("bounds", [{"lower": 1.1}, {"upper": 0.9}, {"lower": -0.1}, {"level": "word"}])
def test_bounds_that_equal_models_do_not_meet_are_refused(bounds: dict[str, Any]):
    for correction in (TIS, MIS, IcePop):
        with pytest.raises(ValueError, match=next(iter(bounds))):
            correction(**bounds)


def test_terms_add_up():
    inputs = make_inputs()
    mask = inputs.loss_mask
    assert inputs.entropy is not None
    loss, metrics = LOSSES["all"](inputs)
    weight = TIS()(inputs)[0] * MIS("sequence")(inputs)[0] * IcePop("geometric")(inputs)[0]
    expected = weight * PPOClip()(inputs)[0] + KLTerm(0.1, k3, "importance")(inputs)[0] - 0.01 * inputs.entropy
    torch.testing.assert_close(loss[mask], expected[mask])
    assert {"ratio", "tis_token_clipped", "mis_sequence_masked", "icepop_geometric_masked", "kl"} <= metrics.keys()


def test_a_recipe_says_what_the_loss_is_and_what_it_needs():
    section = AlgorithmSection.model_validate(
        {
            "loss": {"name": "gspo", "by_token": True},
            "corrections": ["tis", {"name": "mis", "level": "geometric"}],
            "kl": {"coef": 0.01, "gradient": "k2"},
            "entropy_coef": 0.02,
        }
    )
    objective = build_loss(section)
    kl = KLTerm(0.01, k3, "k2")
    assert objective == Objective(GSPO(by_token=True), (TIS(), MIS("geometric")), kl, entropy_coef=0.02)
    assert needs_of(objective) == {"entropy", "ref_logprobs"}
    assert needs_of(build_loss(AlgorithmSection())) == frozenset()
    assert needs_of(build_loss(AlgorithmSection(loss=HookSpec(name="dpo")))) == {"ref_logprobs", "group_index"}
    in_reward = AlgorithmSection.model_validate({"kl": {"coef": 0.01, "place": "reward"}})
    assert build_loss(in_reward).kl is None


@pytest.mark.parametrize("name", ["dpo", "distillation", "value_clip", "kl_own", "all"])
def test_a_column_that_is_not_there_is_named(name: str):
    inputs = make_inputs()
    for column in needs_of(LOSSES[name]):
        with pytest.raises(ValueError, match=f"inputs.{column} is None"):
            LOSSES[name](dataclasses.replace(inputs, **{column: None}))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PPOClip(dual_clip=1.0), "dual_clip"),
        (lambda: GSPO(clip_low=0), "clip_low"),
        (lambda: GSPO(clip_high=-1), "clip_high"),
        (lambda: CISPO(clip_high=0), "clip_high"),
        (lambda: SAPO(tau_negative=0), "tau_negative"),
        (lambda: DPO(beta=0), "beta"),
        (lambda: ValueClip(clip=0), "clip"),
    ],
)
def test_parameters_without_meaning_are_refused(make: Callable[[], Any], name: str):
    with pytest.raises(ValueError, match=f"{name}="):
        make()
