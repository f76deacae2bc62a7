"""The output head: logprobs and entropies from hidden states, with a backward pass of its own.

Logits are in the model's dtype, and exist once: the gradient overwrites them. Where they fit `max_kept_bytes` they wait
for the backward pass; otherwise they are made in chunks, of which only two numbers a row are kept, and made again.
Softmax, logprob and entropy are computed in float32 (on a GPU in one pass over the logits, in one more for the
gradient). The vocabulary may be divided over tensor-parallel ranks.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd import Function


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How to compute.

    Attributes:
        vocab_size: real rows of the whole vocabulary; padding rows take no part.
        temperature: logits are divided by it.
        entropy_grad: whether the entropy has a gradient.
        group: ranks that divide the vocabulary in equal parts; None for one rank.
        max_kept_bytes: most bytes of logits that wait for the backward pass.
        chunk_bytes: bytes of logits made at once otherwise.
    """

    vocab_size: int
    temperature: float = 1.0
    entropy_grad: bool = False
    group: Any = None
    max_kept_bytes: int = 256 * 2**20
    chunk_bytes: int = 256 * 2**20


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """Log probability of each target and entropy in nats of the distribution that it is drawn from.

    Args:
        hidden: [M, H]. Its gradient is that of this rank's part of the vocabulary; the sum over the group is the
            caller's (Megatron's `copy_to_tensor_model_parallel_region`).
        weight: this rank's rows of the output matrix, [V, H].
        targets: token ids in the whole vocabulary, int64 [M].
        options: see there.

    Returns:
        float32 [M] each.
    """
    if not torch.is_grad_enabled():  # which a Function cannot see from inside
        options = replace(options, max_kept_bytes=0)
    return _Head.apply(hidden, weight, targets, options)


class _Head(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions) -> Any:
        row_bytes = weight.shape[0] * hidden.element_size()
        keeps = any(ctx.needs_input_grad) and len(hidden) * row_bytes <= options.max_kept_bytes
        size = max(1, len(hidden) if keeps else options.chunk_bytes // row_bytes)
        first, vocab = _shard(len(weight), options)
        local = targets - first
        kept, parts = [], []
        for rows, row_targets in zip(hidden.split(size), local.split(size), strict=True):
            logits = rows @ weight.t()
            parts.append(row_statistics(logits, row_targets, vocab, options.temperature))
            if keeps:
                kept.append(logits)
            del logits
        top, total, weighted, target = (torch.cat(column) for column in zip(*parts, strict=True))
        if options.group is not None:
            top, total, weighted, target = _over_ranks(top, total, weighted, target, options.group)
        normaliser = top + total.log()
        logprobs, entropy = target - normaliser, normaliser - weighted / total
        ctx.options, ctx.size, ctx.vocab, ctx.kept = options, size, vocab, kept
        ctx.save_for_backward(hidden, weight, local, normaliser, entropy)
        if not options.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, local, normaliser, entropy = ctx.saved_tensors
        options, kept, ctx.kept = ctx.options, ctx.kept, []
        for_logprobs, for_entropy = grads[0], grads[1] if options.entropy_grad else None
        # Several chunks are summed in float32.
        hidden_grads, weight_grad = [], None
        for number, start in enumerate(range(0, max(1, len(hidden)), ctx.size)):
            rows = slice(start, start + ctx.size)
            logits = kept[number] if kept else hidden[rows] @ weight.t()
            per_row = (local[rows], normaliser[rows], entropy[rows], for_logprobs[rows])
            become_gradient(
                logits, *per_row, None if for_entropy is None else for_entropy[rows], ctx.vocab, options.temperature
            )
            if ctx.needs_input_grad[0]:
                hidden_grads.append(logits @ weight)
            if ctx.needs_input_grad[1]:
                product = logits.t() @ hidden[rows]
                weight_grad = product if weight_grad is None else weight_grad.float().add_(product)
            kept[number : number + 1] = [None] if kept else []
            del logits
        hidden_grad = torch.cat(hidden_grads) if hidden_grads else None
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None


def _shard(num_rows: int, options: HeadOptions) -> tuple[int, int]:
    """This rank's first token, and how many of its rows are real."""
    first = 0 if options.group is None else num_rows * distributed.get_rank(options.group)
    return first, min(max(options.vocab_size - first, 0), num_rows)


def _over_ranks(top: Tensor, total: Tensor, weighted: Tensor, target: Tensor, group: Any) -> tuple[Tensor, ...]:
    """Statistics over the whole vocabulary from those of its parts."""
    highest = top.clone()
    distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=group)
    scale = (top - highest).exp()
    sums = torch.stack([total * scale, weighted * scale, target])
    distributed.all_reduce(sums, group=group)
    return highest, *sums.unbind()


def row_statistics(logits: Tensor, targets: Tensor, vocab: int, temperature: float) -> tuple[Tensor, ...]:
    """For each row x = logits[:vocab] / temperature: max, sum of exp(x - max), sum of exp(x - max) x, and x[target].

    The last is 0 where the target lies outside [0, vocab). float32 [M] each.
    """
    if logits.is_cuda:
        from miles_train.megatron import head_kernels  # noqa: PLC0415  # Triton, which a CPU does not need

        return head_kernels.row_statistics(logits, targets, vocab, temperature)
    x = logits[:, :vocab].float()
    if not vocab:
        return x.new_full((len(x),), float("-inf")), *(x.new_zeros(len(x)) for _ in range(3))
    if temperature != 1.0:
        x = x / temperature
    top = x.amax(-1)
    exponentials = (x - top[:, None]).exp()
    is_here = (targets >= 0) & (targets < vocab)
    target = x.gather(-1, targets.clamp(0, vocab - 1)[:, None])[:, 0].where(is_here, 0.0)
    return top, exponentials.sum(-1), (exponentials * x).sum(-1), target


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
    """Overwrite logits with their gradient.

    With p = softmax(x), x = logits / temperature: d logprob / dx = onehot(target) - p, and
    d entropy / dx = -p (log p + entropy).
    """
    if logits.is_cuda:
        from miles_train.megatron import head_kernels  # noqa: PLC0415  # Triton, which a CPU does not need

        head_kernels.become_gradient(
            logits, targets, normaliser, entropy, for_logprobs, for_entropy, vocab, temperature
        )
        return
    log_p = logits[:, :vocab].float() / temperature - normaliser[:, None]
    p = log_p.exp()
    gradient = -p * for_logprobs[:, None]
    if for_entropy is not None:
        gradient -= for_entropy[:, None] * p * (log_p + entropy[:, None])
    is_here = ((targets >= 0) & (targets < vocab)).nonzero()[:, 0]
    gradient[is_here, targets[is_here]] += for_logprobs[is_here]
    logits[:, :vocab] = gradient / temperature
    logits[:, vocab:] = 0
