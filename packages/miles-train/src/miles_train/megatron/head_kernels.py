"""Triton kernels of `head`: one pass over the logits for what the forward pass needs, one for the gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_NUM_WARPS = 8


def row_statistics(logits: Tensor, targets: Tensor, vocab: int, temperature: float) -> tuple[Tensor, ...]:
    """As `head.row_statistics`; logits are contiguous."""
    top, total, weighted, target = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(4))
    if len(logits):
        _launch(_row_statistics, (len(logits),))(
            logits, targets, top, total, weighted, target, logits.shape[1], vocab, float(temperature), BLOCK=_BLOCK
        )
    return top, total, weighted, target


def become_gradient(
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    entropy: Tensor,
    for_logprobs: Tensor,
    for_entropy: Tensor | None,
    vocab: int,
    temperature: float,
) -> None:
    """As `head.become_gradient`; logits are contiguous."""
    if not len(logits):
        return
    _launch(_become_gradient, (len(logits), triton.cdiv(logits.shape[1], _BLOCK)))(
        logits,
        targets,
        normaliser,
        entropy,
        for_logprobs.contiguous(),
        (for_logprobs if for_entropy is None else for_entropy).contiguous(),
        logits.shape[1],
        vocab,
        float(temperature),
        HAS_ENTROPY=for_entropy is not None,
        BLOCK=_BLOCK,
    )


def _launch(kernel: Any, grid: tuple[Any, ...]) -> Any:
    def run(*args: Any, **kwargs: Any) -> None:
        kernel[grid](*args, **kwargs, num_warps=_NUM_WARPS)

    return run


@triton.jit
def _row_statistics(logits, targets, top, total, weighted, target, width, vocab, temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    highest = -float("inf")
    exponentials = 0.0
    products = 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        x = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32) / temperature
        higher = tl.maximum(highest, tl.max(x, axis=0))
        rescale = tl.exp(highest - higher)
        e = tl.exp(x - higher)
        exponentials = exponentials * rescale + tl.sum(e, axis=0)
        products = products * rescale + tl.sum(tl.where(inside, e * x, 0.0), axis=0)
        highest = higher
    token = tl.load(targets + row)
    is_here = (token >= 0) & (token < vocab)
    value = tl.load(logits + token, mask=is_here, other=0.0).to(tl.float32) / temperature
    tl.store(top + row, highest)
    tl.store(total + row, exponentials)
    tl.store(weighted + row, products)
    tl.store(target + row, value)


@triton.jit
def _become_gradient(
    logits,
    targets,
    normaliser,
    entropy,
    for_logprobs,
    for_entropy,
    width,
    vocab,
    temperature,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    stored = columns < width
    places = logits + row * width + columns
    log_p = tl.load(places, mask=stored, other=0.0).to(tl.float32) / temperature - tl.load(normaliser + row)
    p = tl.where(columns < vocab, tl.exp(log_p), 0.0)
    scale = tl.load(for_logprobs + row)
    gradient = scale * (tl.where(columns == tl.load(targets + row), 1.0, 0.0) - p)
    if HAS_ENTROPY:
        gradient -= tl.load(for_entropy + row) * p * (log_p + tl.load(entropy + row))
    # A target beyond the real rows belongs to another rank.
    gradient = tl.where(columns < vocab, gradient / temperature, 0.0)
    tl.store(places, gradient.to(logits.dtype.element_ty), mask=stored)
