"""Packed micro-batches as Megatron takes them: its "thd" layout, tokens of all samples in one row."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from miles_core.errors import InputError
from miles_train.megatron.upstream import PackedSeqParams
from miles_train.microbatches import MicroBatch

# Longest segments are rounded up to a quarter of a power of two, and to this: kernels are built per rounded length.
_STEP = 128


def packed_params(micro: MicroBatch, device: torch.device) -> PackedSeqParams | None:
    """Where the segments of a packed micro-batch lie; None for a padded one.

    Args:
        micro: one row of tokens.
        device: of the model.
    """
    if micro.ends is None:
        return None
    ends = torch.from_numpy(np.append(np.int32(0), micro.ends)).to(device)
    longest = int(np.diff(micro.ends, prepend=0).max())
    if device.type == "cuda":
        longest = rounded_up(longest)
        # Rotary frequencies for as many positions as there are tokens would be taken for one segment's
        # (megatron/core/models/common/embeddings/rope_utils.py, `_apply_rotary_pos_emb_thd`).
        if longest == micro.ends[-1] and len(micro.ends) > 1:
            longest += _STEP
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pad_between_seqs=False,  # said, so that nobody looks on the GPU
    )


def rounded_up(length: int) -> int:
    """To one of four lengths between two powers of two, at least 128."""
    step = max(_STEP, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def decide_packing(asked: bool | None, chunks: Iterable[nn.Module], *, by_default: bool, context_parallel: int) -> bool:
    """Whether micro-batches are packed.

    Args:
        asked: the trainer's parameter `packed`; None leaves it to what the model can and what is fast.
        chunks: the model; a module with `supports_packing = False` cannot keep segments apart.
        by_default: whether packed is the faster way here.
        context_parallel: ranks that share a sequence; they divide padded ones.

    Raises:
        InputError: packing was asked for and cannot be.
    """
    if asked is False:
        return False
    refusing = {
        type(module).__name__
        for chunk in chunks
        for module in chunk.modules()
        if not getattr(module, "supports_packing", True)
    }
    reason = f"{', '.join(sorted(refusing))} cannot keep packed sequences apart" if refusing else ""
    if context_parallel > 1:
        reason = f"context_parallel_size = {context_parallel} divides padded sequences"
    if asked and reason:
        raise InputError("train.packed", True, reason, "Set it to false, or remove it.")
    return not reason and (by_default if asked is None else asked)
