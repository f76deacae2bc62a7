"""Log probabilities of tokens from hidden states, without holding all logits at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from miles_train.microbatches import MicroBatch

# Logits of one chunk in float32 stay below this: small beside a layer's activations, large enough for a full GEMM.
MAX_CHUNK_BYTES = 256 * 2**20


def token_logprobs(
    model: Callable[..., Any],
    micro: MicroBatch,
    *,
    vocab_size: int,
    temperature: float,
    entropy_grad: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Run the model over a micro-batch.

    Args:
        model: a `GPTModel`, wrapped or not; tensor parallel size 1.
        micro: the tokens.
        vocab_size: real rows of the embedding; padding rows take no part.
        temperature: logits are divided by it, as the sampling engine does.
        entropy_grad: whether the entropy needs a gradient.
        device: of the model.

    Returns:
        For each selected token of the micro-batch its log probability with gradient, and the entropy in nats of the
        distribution it was drawn from; float32 [M] each.
    """
    tokens = torch.from_numpy(micro.tokens).to(device)
    rows, positions, targets = (
        torch.from_numpy(index).to(device) for index in (micro.rows, micro.positions, micro.targets)
    )

    def head(hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Any:
        selected = hidden_states[positions, rows]  # [S, B, H] -> [M, H]

        def chunk_logprobs(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            logits, _ = output_layer(hidden.unsqueeze(1), weight=output_weight)
            return _from_logits(logits[:, 0, :vocab_size], target, temperature, entropy_grad)

        size = max(1, MAX_CHUNK_BYTES // (4 * vocab_size))
        if len(targets) <= size:
            return chunk_logprobs(selected, targets)
        # Logits of a chunk are computed again in the backward pass instead of being kept.
        chunks = [
            checkpoint(chunk_logprobs, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(selected.split(size), targets.split(size), strict=True)
        ]
        return tuple(torch.cat(column) for column in zip(*chunks, strict=True))

    return model(tokens, torch.zeros_like(tokens), None, output_processor=head)


def _from_logits(logits: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """Logprob of each target and entropy of each row, float32 [M], from logits [M, vocab]."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - normaliser
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = normaliser - (logits.softmax(-1) * logits).sum(-1)
    return logprobs, entropy
