"""What transformers' embedding does and Megatron's does not: the padding token's row takes no gradient from its input.

`torch.nn.Embedding(..., padding_idx=pad_token_id)`. Where `pad_token_id` is also the token that ends a turn, that token
does occur inside samples. Its row still learns as part of a tied output head.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles_train.megatron.upstream import GPTModel


def hold_padding_row(model: GPTModel, config: Mapping[str, Any]) -> None:
    """Keep the padding token out of the embedding's gradient.

    Args:
        model: a built chunk; one without an embedding is left as it is.
        config: config.json; the text part of it counts where there is one.
    """
    config = config.get("text_config") or config
    padding = config.get("pad_token_id")
    if padding is None or not hasattr(model, "embedding"):
        return
    # A negative one counts from the end, as in torch.
    hook = partial(_detach_padding, padding % config["vocab_size"])
    model.embedding.word_embeddings.register_forward_hook(hook)


def _detach_padding(padding: int, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The same embeddings; output is [B, S, H], or this rank's part of the sequence as [S / TP, B, H]."""
    (ids,) = args
    if module.reduce_scatter_embeddings:
        # Contiguous, or the result would take over the transposed strides, which a pipeline cannot send.
        ids = ids.t().contiguous().tensor_split(module.tp_group.size())[module.tp_group.rank()]
    return torch.where((ids == padding)[..., None], output.detach(), output)
