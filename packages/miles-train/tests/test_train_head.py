"""The head's logprobs, entropies and gradients are those of torch's own operations, kept or made again."""

import os
import subprocess
import sys

import pytest
import torch

from miles_train.megatron import head
from miles_train.megatron.head import HeadOptions, head_logprobs

VOCAB, PADDED, HIDDEN, ROWS = 50, 56, 8, 13


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    scales = torch.randn(2, ROWS, generator=generator)
    return hidden, weight, targets, scales


def by_torch(hidden, weight, targets, temperature):
    logprobs = ((hidden @ weight[:VOCAB].t()).float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("rows_at_once", [None, 1, 4, ROWS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_values_and_gradients_are_those_of_torch(rows_at_once, temperature, entropy_grad):
    hidden, weight, targets, scales = problem()
    row = 4 * PADDED
    sizes = {} if rows_at_once is None else {"max_kept_bytes": 0, "chunk_bytes": row * rows_at_once}
    options = HeadOptions(VOCAB, temperature, entropy_grad, **sizes)
    ours = head_logprobs(hidden, weight, targets, options)
    theirs = by_torch(hidden, weight, targets, temperature)
    torch.testing.assert_close(ours, theirs)
    assert ours[1].requires_grad == entropy_grad
    count = 2 if entropy_grad else 1
    gradients = [
        torch.autograd.grad(sum((scales[i] * pair[i]).sum() for i in range(count)), (hidden, weight))
        for pair in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients)
    assert (gradients[0][1][VOCAB:] == 0).all()


def test_nothing_is_kept_without_gradients(monkeypatch):
    hidden, weight, targets, _ = problem()
    sizes = []

    def recorded(logits, *args):
        sizes.append(len(logits))
        return row_statistics(logits, *args)

    row_statistics = head.row_statistics
    monkeypatch.setattr(head, "row_statistics", recorded)
    with torch.no_grad():
        options = HeadOptions(VOCAB, chunk_bytes=4 * PADDED * 5)
        ours = head_logprobs(hidden, weight, targets, options)
    torch.testing.assert_close(ours, by_torch(hidden, weight, targets, 1.0))
    assert sizes == [5, 5, 3]


def test_bfloat16_is_summed_in_float32():
    hidden, weight, targets, scales = problem(torch.bfloat16)
    logprobs, entropy = head_logprobs(hidden, weight, targets, HeadOptions(VOCAB))
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((logprobs, entropy), by_torch(hidden, weight, targets, 1.0))
    (logprobs * scales[0]).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_no_rows_give_no_gradient():
    hidden, weight, targets, _ = problem()
    logprobs, _ = head_logprobs(hidden[:0], weight, targets[:0], HeadOptions(VOCAB))
    logprobs.sum().backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


KERNELS = """
import torch
from miles_train.megatron import head, head_kernels
torch.manual_seed(0)
for first, vocab in ((0, 5000), (3000, 4100), (90000, 0)):
    logits = 3 * torch.randn(3, 5003)
    targets = torch.tensor([17, 4200, 4999]) - first
    ours = head_kernels.row_statistics(logits, targets, vocab, 0.7)
    torch.testing.assert_close(ours, head.row_statistics(logits, targets, vocab, 0.7))
    normaliser = ours[0] + ours[1].log() if vocab else torch.ones(3)
    entropy, for_logprobs, for_entropy = torch.rand(3, 3)
    for slope in (None, for_entropy):
        both = logits.clone(), logits.clone()
        for module, copy in zip((head, head_kernels), both):
            module.become_gradient(copy, targets, normaliser, entropy, for_logprobs, slope, vocab, 0.7)
        torch.testing.assert_close(*both)
"""


def test_kernels_compute_what_torch_computes():
    """In Triton's interpreter, which must be chosen before Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
