"""How a tensor's change travels: bits that changed, sorted into planes, and packed by zstd.

A training step at a small learning rate leaves most bfloat16 weights as they are, and changes the others in their last
bits. So old XOR new is nearly all zeros; byte k of every element comes before byte k + 1 of any (the "shuffle" of
Blosc and HDF5), so that the zeros of the upper bytes lie together; and zstd makes little of zeros.
"""

from __future__ import annotations

import torch

from miles_sync.errors import CorruptError

try:
    import zstandard
except ImportError as error:
    raise ImportError('weights on a disk are packed with zstd: pip install "miles-sync[disk]"') from error

_LEVEL = 3  # higher ones gain a few percent of the size for a multiple of the time


def packed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What makes `new` of `old`, which has its dtype and shape: uint8, one-dimensional; empty where nothing changed."""
    change = _bytes(old) ^ _bytes(new)
    if not bool(change.any()):
        return change[:0]
    planes = change.view(-1, new.element_size()).t().contiguous()
    frame = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(memoryview(planes.numpy()))
    return torch.frombuffer(bytearray(frame), dtype=torch.uint8)


def apply(tensor: torch.Tensor, delta: torch.Tensor, what: str) -> None:
    """Change a tensor (contiguous, host memory) in place by what `packed` gave.

    Raises `CorruptError`, naming `what`, where that is cut short or was changed; the tensor then is as it was.
    """
    if not delta.numel():
        return
    try:
        frame = memoryview(delta.numpy())
        # The length that the frame claims for itself is not trusted: it may ask for any amount of memory.
        if zstandard.frame_content_size(frame) != tensor.nbytes:
            raise CorruptError(f"{what}: its change is of another length", stage="transfer")
        data = zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{what}: its change cannot be unpacked: {error}", stage="transfer") from error
    planes = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.element_size(), -1)
    _bytes(tensor).bitwise_xor_(planes.t().contiguous().view(-1))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
