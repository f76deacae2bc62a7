"""Log probabilities of tokens from hidden states, without holding all logits at once, on all ranks of a layout.

What each kind of parallelism brings to the last stage, and what is done about it:

- sequence: a rank's hidden states are of part of the sequence. They are gathered, then the wanted tokens selected.
- tensor: a rank's logits are of part of the vocabulary. `head` reduces maximum, sum and the target's logit over the
  group: every rank has the same logprobs (Shoeybi et al. 2019, arXiv:1909.08053, section 3). The gradient of the
  hidden states, which each rank has a part of, is summed once for all chunks of logits.
- context: a rank's hidden states are of some chunks of the sequence. Each rank computes the logprobs of its own tokens
  and they are put in place by a sum over the group, so that a loss sees whole samples. All ranks of the group then
  compute the same loss; the gradient of that sum is therefore the identity, each rank keeping what is its own.
- pipeline: a stage that is not the last returns hidden states for the next one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from miles_train.megatron import zigzag
from miles_train.megatron.head import HeadOptions, head_logprobs
from miles_train.megatron.packing import packed_params
from miles_train.megatron.runtime import on_device
from miles_train.megatron.specs.predict_more import with_loss
from miles_train.megatron.upstream import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    parallel_state,
)
from miles_train.microbatches import MicroBatch, far_enough

# More logits than this are made in chunks, and again for the backward pass: small beside a layer's activations, large
# enough for a full GEMM. On a GPU more are kept: making them again is a third more work in the head.
MAX_LOGITS_BYTES = 256 * 2**20
_GPU_CHUNK_BYTES = 2**30
_GPU_KEPT_SHARE = 1 / 8  # of its memory


def token_logprobs(
    model: Callable[..., Any],
    micro: MicroBatch,
    *,
    vocab_size: int,
    temperature: float,
    entropy_grad: bool,
    device: torch.device,
    weight_ahead: float = 0.0,
) -> Any:
    """Run one chunk of the model over a micro-batch.

    Args:
        model: a `GPTModel`, wrapped or not.
        micro: the tokens; the same on all ranks of a copy of the model.
        vocab_size: real rows of the embedding; padding rows take no part.
        temperature: logits are divided by it, as the sampling engine does.
        entropy_grad: whether the entropy needs a gradient.
        device: of the model.
        weight_ahead: weight of -log p of every selected token as layers for multi-token prediction, if the model has
            such, predict it from further back. The backward pass adds the gradient of that loss.

    Returns:
        From the last chunk of the last stage, for each selected token of the micro-batch its log probability with
        gradient, and the entropy in nats of the distribution it was drawn from; float32 [M] each. From other chunks
        the hidden states.
    """
    tokens = _padded(on_device(micro.tokens, device))
    rows, positions, targets = (on_device(index, device) for index in (micro.rows, micro.positions, micro.targets))
    mine, places = _own_tokens(tokens.shape[1], positions)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    kept, at_once = _logits_bytes(device)
    options = HeadOptions(
        vocab_size,
        temperature,
        entropy_grad,
        group if group.size() > 1 else None,
        max_kept_bytes=kept,
        chunk_bytes=at_once,
    )

    def head(
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        more_hidden_states: Sequence[Tensor] = (),
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        hidden = _whole(hidden_states, output_layer)
        # [S, B, H] -> [M, H]; the backward pass of an index per dim would sort them.
        selected = hidden.flatten(0, 1).index_select(0, places * hidden.shape[1] + rows[mine])
        weight = output_layer.weight if output_weight is None else output_weight
        for ahead, states in enumerate(more_hidden_states, start=1):
            far = on_device(far_enough(micro, ahead), device)
            more = _whole(states, output_layer).flatten(0, 1)
            more = more.index_select(0, (positions[far] - ahead) * hidden.shape[1] + rows[far])
            apart = output_layer.config.mtp_detach_heads
            logprobs = head_logprobs(more, weight.detach() if apart else weight, targets[far], options)[0]
            selected = with_loss(selected, -weight_ahead * logprobs.sum())
        return _over_context_ranks(head_logprobs(selected, weight, targets[mine], options), mine, len(targets))

    return _run(model, micro, tokens, head)


@torch.no_grad()
def token_logits(model: Callable[..., Any], micro: MicroBatch, *, vocab_size: int, device: torch.device) -> Any:
    """Run one chunk of the model over a micro-batch for its logits, all of them: for tests of a model.

    Args:
        model: a `GPTModel`, wrapped or not.
        micro: the tokens; the same on all ranks of a copy of the model.
        vocab_size: real rows of the embedding.
        device: of the model.

    Returns:
        From the last chunk of the last stage, for each selected token of the micro-batch the logits that predict it,
        float32 [M, V], on every tensor- and context-parallel rank; from other chunks the hidden states.
    """
    tokens = _padded(on_device(micro.tokens, device))
    rows, positions = on_device(micro.rows, device), on_device(micro.positions, device)
    mine, places = _own_tokens(tokens.shape[1], positions)

    def head(hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        hidden = _whole(hidden_states, output_layer)
        weight = output_layer.weight if output_weight is None else output_weight
        selected = hidden.flatten(0, 1).index_select(0, places * hidden.shape[1] + rows[mine])
        here = (selected @ weight.t()).float()
        parts = [torch.empty_like(here) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
        distributed.all_gather(parts, here, group=parallel_state.get_tensor_model_parallel_group())
        mine_of_all = torch.cat(parts, -1)[:, :vocab_size]
        if parallel_state.get_context_parallel_world_size() == 1:
            return mine_of_all
        logits = mine_of_all.new_zeros(len(rows), vocab_size).index_copy(0, mine, mine_of_all)
        distributed.all_reduce(logits, group=parallel_state.get_context_parallel_group())
        return logits

    return _run(model, micro, tokens, head)


def _run(model: Callable[..., Any], micro: MicroBatch, tokens: Tensor, head: Callable[..., Any]) -> Any:
    """The model on this rank's part of the padded tokens [B, S], with `head` as its output processor."""
    tokens = tokens[:, _positions_here(tokens.shape[1], tokens.device)]
    packing = packed_params(micro, tokens.device)
    return model(tokens, torch.zeros_like(tokens), None, packed_seq_params=packing, output_processor=head)


def _logits_bytes(device: torch.device) -> tuple[int, int]:
    """Most bytes of logits that wait for the backward pass, and that are made at once otherwise."""
    if device.type != "cuda":
        return MAX_LOGITS_BYTES, MAX_LOGITS_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory * _GPU_KEPT_SHARE), _GPU_CHUNK_BYTES


def _padded(tokens: Tensor) -> Tensor:
    """[B, S] with S what ranks can share: tensor-parallel ones the tokens that each context-parallel one holds."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    context = parallel_state.get_context_parallel_world_size()
    multiple = tensor * context if context == 1 else 2 * tensor * context
    return torch.nn.functional.pad(tokens, (0, -tokens.shape[1] % multiple))


def _positions_here(length: int, device: torch.device) -> Any:
    """Which positions of the sequence this context-parallel rank holds."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return slice(None)
    return zigzag.positions(length, parallel_state.get_context_parallel_rank(), size, device)


def _own_tokens(length: int, positions: Tensor) -> tuple[Any, Tensor]:
    """Which of the selected tokens this rank predicts, and where among its own positions they lie."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return slice(None), positions
    places = torch.full((length,), -1, device=positions.device)
    here = _positions_here(length, positions.device)
    places[here] = torch.arange(len(here), device=positions.device)
    places = places[positions]
    mine = (places >= 0).nonzero()[:, 0]
    return mine, places[mine]


def _whole(hidden: Tensor, output_layer: Any) -> Tensor:
    """Hidden states of all tokens of the context-parallel rank, whose gradient is summed over tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    if output_layer.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=group)
    return copy_to_tensor_model_parallel_region(hidden, group=group)


def _over_context_ranks(columns: tuple[Tensor, Tensor], mine: Any, count: int) -> tuple[Tensor, Tensor]:
    """Of each column [mine] the whole [count]: what every rank of the context-parallel group computed, in place."""
    group: Any = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return columns
    both = torch.stack(columns)
    logprobs, entropy = _Sum.apply(both.new_zeros(2, count).index_copy(1, mine, both), group)
    return logprobs, entropy


class _Sum(torch.autograd.Function):
    """A sum over ranks that all go on to compute the same: its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values, group=group)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
