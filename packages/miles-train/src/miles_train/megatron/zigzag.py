"""Which tokens of a sequence lie on which context-parallel rank.

Megatron cuts a sequence into 2 * size equal chunks and gives rank r chunks r and 2 * size - 1 - r (megatron/core/
utils.py, `get_batch_on_this_cp_rank`): a late chunk, which attends to much, goes with an early one.
"""

import torch
from torch import Tensor


def positions(length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Positions in the sequence of a rank's tokens, in the order it holds them, int64 [length / size].

    Args:
        length: tokens of the sequence, a multiple of 2 * size.
        rank: in the context-parallel group.
        size: of the group.
        device: of the result.
    """
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def in_order(gathered: Tensor, size: int) -> Tensor:
    """Put what all ranks hold, one rank after the other along dim 0, into the order of the sequence."""
    chunks = gathered.unflatten(0, (2 * size, -1))
    places = [2 * chunk if chunk < size else 2 * (2 * size - 1 - chunk) + 1 for chunk in range(2 * size)]
    return chunks[places].flatten(0, 1)
