"""Causal attention of a sequence that context-parallel ranks share, in plain torch."""

from typing import Any

import torch
from torch import Tensor

from miles_train.megatron import zigzag
from miles_train.megatron.upstream import gather_from_sequence_parallel_region


def attend_over_ranks(query: Tensor, key: Tensor, value: Tensor, group: Any, scale: float | None) -> Tensor:
    """Attend from this rank's tokens to all before them, whichever rank holds these.

    Keys and values of all ranks are gathered; their gradients are summed over the ranks that attended to them and go
    back to where they came from. Each of the rank's two chunks attends to the keys up to its own end.

    Args:
        query: [S / ranks, B, heads, head_dim], the rank's tokens as `zigzag.positions` orders them.
        key: [S / ranks, B, groups, head_dim].
        value: [S / ranks, B, groups, any].
        group: the context-parallel group.
        scale: factor on the scores; None for 1 / sqrt(head_dim).

    Returns:
        [S / ranks, B, heads, any].
    """
    size, rank = group.size(), group.rank()
    keys, values = (
        zigzag.in_order(gather_from_sequence_parallel_region(part, group=group), size).permute(1, 2, 0, 3)
        for part in (key, value)
    )
    contexts = []
    for chunk, queries in zip((rank, 2 * size - 1 - rank), query.chunk(2), strict=True):
        stop = (chunk + 1) * len(queries)
        mask = torch.ones(len(queries), stop, dtype=torch.bool, device=query.device).tril(stop - len(queries))
        context = torch.nn.functional.scaled_dot_product_attention(
            queries.permute(1, 2, 0, 3),
            keys[:, :, :stop],
            values[:, :, :stop],
            attn_mask=mask,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        contexts.append(context.permute(2, 0, 1, 3))
    return torch.cat(contexts)
