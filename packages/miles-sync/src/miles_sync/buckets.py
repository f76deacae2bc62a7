"""Buckets: the flat buffer cut into bounded pieces, and the packing of tensors into them.

Offsets come from the manifest and are computed once per layout; a bucket is a range of the flat buffer, not a
list of tensors, so a tensor larger than a bucket simply spans several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from miles_sync.digest import CHUNK_BYTES
from miles_sync.errors import ManifestError
from miles_sync.manifest import ALIGNMENT, Entry, Manifest, describe

BUCKET_BYTES = 8 * CHUNK_BYTES
"""64 MiB: long against the 50 us a control message takes, short enough for sender and receiver to overlap."""


@dataclass(frozen=True)
class Bucket:
    """Bytes `start` to `stop` of the flat buffer."""

    index: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


def cut(total_bytes: int, bucket_bytes: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Cut a flat buffer into buckets of `bucket_bytes` (a multiple of `CHUNK_BYTES`); the last is shorter."""
    if bucket_bytes <= 0 or bucket_bytes % CHUNK_BYTES:
        raise ValueError(f"bucket_bytes={bucket_bytes} must be a positive multiple of {CHUNK_BYTES}")
    starts = range(0, total_bytes, bucket_bytes)
    return tuple(Bucket(index, start, min(start + bucket_bytes, total_bytes)) for index, start in enumerate(starts))


def pack(
    manifest: Manifest,
    tensors: Iterable[tuple[str, torch.Tensor]],
    buckets: Iterable[Bucket],
    buffer_for: Callable[[Bucket], torch.Tensor],
) -> Iterator[tuple[Bucket, torch.Tensor]]:
    """Copy tensors into buckets, yielding each bucket as soon as it is full.

    Args:
        manifest: Says which tensor lies where.
        tensors: Named tensors in the manifest's order, on any device, contiguous or not.
        buckets: The cut of the manifest's flat buffer.
        buffer_for: Gives the uint8 buffer (`[bucket.nbytes]`) that a bucket is packed into. It is asked only
            when the bucket before has been yielded and taken, so it may wait for a buffer to be free.

    Yields:
        Each bucket with its buffer, gaps zeroed. Raises `ManifestError` where a tensor is not what
        the manifest says or the source yields too few or too many.
    """
    queue = iter(buckets)
    bucket = next(queue)
    buffer = buffer_for(bucket)
    for position, data in _runs(manifest, tensors):
        while data.numel():
            if position == bucket.stop:
                yield bucket, buffer
                bucket = next(queue)
                buffer = buffer_for(bucket)
            count = min(bucket.stop - position, data.numel())
            at = position - bucket.start
            buffer[at : at + count].copy_(data[:count])
            position += count
            data = data[count:]
    yield bucket, buffer


def _runs(manifest: Manifest, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[int, torch.Tensor]]:
    """The flat buffer as (position, bytes): each tensor, then the zero bytes up to the next boundary."""
    zeros = torch.zeros(ALIGNMENT, dtype=torch.uint8)
    source = iter(tensors)
    for entry in manifest.entries:
        name, tensor = next(source, (None, None))
        if name is None or tensor is None:
            raise _changed(f"ended before {entry.name!r}")
        _same(entry, name, tensor)
        yield entry.offset, tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        end = entry.offset + entry.nbytes
        yield end, zeros[: -end % ALIGNMENT]
    extra = next(source, None)
    if extra is not None:
        raise _changed(f"yields {extra[0]!r} beyond its metadata")


def _same(entry: Entry, name: str, tensor: torch.Tensor) -> None:
    meta = describe(name, tensor)
    if (meta.name, meta.dtype, meta.shape) != (entry.name, entry.dtype, entry.shape):
        raise _changed(
            f"yields {name!r} {meta.dtype} {list(meta.shape)} where its metadata say "
            f"{entry.name!r} {entry.dtype} {list(entry.shape)}"
        )


def _changed(text: str) -> ManifestError:
    return ManifestError(f"the source {text}: metadata and iteration must agree", stage="transfer")
