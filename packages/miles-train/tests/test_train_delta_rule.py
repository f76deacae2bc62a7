"""The gated delta rule in chunks, against its recurrence token by token; the convolution, against its definition."""

import pytest
import torch

from miles_train.megatron.delta_rule import causal_conv1d, chunk_gated_delta_rule, l2norm


def inputs(length, heads=2, key_dim=5, value_dim=3, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, length, heads)
    q, k = (l2norm(torch.randn(*shape, key_dim, generator=generator)) for _ in range(2))
    v = torch.randn(*shape, value_dim, generator=generator)
    g = -decay * torch.rand(shape, generator=generator)
    beta = torch.rand(shape, generator=generator)
    return [column.requires_grad_() for column in (q, k, v, g, beta)]


def recurrence(q, k, v, g, beta):
    """The definition, in float64."""
    q, k, v, g, beta = (column.double() for column in (q, k, v, g, beta))
    memory = torch.zeros(*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1], dtype=torch.float64)
    outputs = []
    for t in range(v.shape[1]):
        memory = g[:, t, :, None, None].exp() * memory
        old = torch.einsum("bhkv,bhk->bhv", memory, k[:, t])
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - old))
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1)


def relative(ours, theirs):
    return float(((ours - theirs).norm() / theirs.norm()).detach())


@pytest.mark.parametrize("decay", [0.0, 0.1, 8.0, 80.0])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_chunks_give_the_recurrence_and_its_gradients(length, decay):
    torch.set_num_threads(1)
    columns = inputs(length, decay=decay)
    ours, theirs = chunk_gated_delta_rule(*columns)[0], recurrence(*columns)
    assert relative(ours, theirs) <= 1e-5
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    ours_all = torch.autograd.grad((ours * weight).sum(), columns)
    theirs_all = torch.autograd.grad((theirs * weight).sum(), columns)
    size = max(float(gradient.norm()) for gradient in theirs_all)
    for ours, theirs in zip(ours_all, theirs_all, strict=True):
        assert float((ours - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-6 * size


def test_a_token_depends_on_none_behind_it():
    columns = [column.detach() for column in inputs(100)]
    cut = [column[:, :70] for column in columns]
    assert torch.allclose(chunk_gated_delta_rule(*columns)[0][:, :70], chunk_gated_delta_rule(*cut)[0], atol=1e-6)


def test_packed_sequences_do_not_see_each_other():
    columns = [column.detach()[:1] for column in inputs(150)]
    ends = torch.tensor([0, 1, 66, 150], dtype=torch.int32)
    packed = chunk_gated_delta_rule(*columns, cu_seqlens=ends)[0]
    parts = [[column[:, a:b] for column in columns] for a, b in [(0, 1), (1, 66), (66, 150)]]
    assert torch.equal(packed, torch.cat([chunk_gated_delta_rule(*part)[0] for part in parts], dim=1))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_convolution_sees_the_token_and_those_before_it(width):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((1, 9, 3), (3, width), (3,)))
    ends = torch.tensor([0, 2, 9], dtype=torch.int32)
    ours, _ = causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=ends)
    for first, end in [(0, 2), (2, 9)]:
        for t in range(first, end):
            seen = x[0, max(first, t - width + 1) : t + 1]
            total = (seen * weight[:, -len(seen) :].T).sum(0) + bias
            assert torch.allclose(ours[0, t], torch.nn.functional.silu(total), atol=1e-6)


def test_half_precision_is_computed_in_float32():
    columns = [column.detach().bfloat16() for column in inputs(80)]
    ours, _ = chunk_gated_delta_rule(*columns)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, chunk_gated_delta_rule(*(column.float() for column in columns))[0].bfloat16())
