"""Gradients as a test of a model wants them: whole, after they were summed over ranks."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from miles_train.megatron.upstream import DistributedDataParallel


def gather_gradients(chunks: Iterable[DistributedDataParallel]) -> None:
    """Bring to each rank the sums that the others hold; collective, after the backward pass.

    The distributed optimizer scatters the sums: each data-parallel rank is left with those of one part of a buffer
    (`start_grad_sync` in megatron/core/distributed/param_and_grad_buffer.py).
    """
    for chunk in chunks:
        whole: Any = chunk  # whose `buffers` is Megatron's list, not torch's method
        for buffer in [*whole.buffers, *whole.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def gradient_of(tensor: Tensor) -> Tensor:
    """Megatron's gradient of a parameter, float32; zeros for a frozen one and for a buffer, which take none."""
    if not isinstance(tensor, torch.nn.Parameter) or not tensor.requires_grad:
        return torch.zeros_like(tensor, dtype=torch.float32)
    gradient: Tensor = tensor.main_grad  # pyright: ignore[reportAttributeAccessIssue]  # Megatron's
    return gradient.float()
