"""Buckets: the flat buffer cut into bounded pieces, and the packing of tensors into them.

Offsets come from the manifest; both sides cut alike. A tensor that does not fit into what is left of a bucket
continues in the next, cut at a multiple of `BLOCK_BYTES` from its own start, so that every part can be digested alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from miles_sync.digest import BLOCK_BYTES, Run, Runs
from miles_sync.errors import ManifestError
from miles_sync.manifest import DTYPES, Entry, Manifest, describe

HOST_BUCKET_BYTES = 32 * BLOCK_BYTES
"""64 MiB: long against the 50 us a control message takes, short enough for sender and receiver to overlap."""

DEVICE_BUCKET_BYTES = 96 * BLOCK_BYTES
"""192 MiB: 0.5 ms of NVLink, so that the start of each broadcast weighs little; two of them stay below 512 MB."""


class Part(NamedTuple):
    """Bytes of one entry: `start` counts from the entry's first byte, `offset` from the flat buffer's."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - of tuple, not needed
    start: int
    nbytes: int
    offset: int


class Piece(NamedTuple):
    """A tensor of the manifest, or a run of its elements.

    Attributes:
        index: Which entry of the manifest.
        start: First element, in the entry's row-major order; 0 for a whole entry.
        data: The entry's dtype. A whole entry has the entry's shape, a run is one-dimensional. A view of memory
            that is reused once the call has returned (on a device: once the current stream has passed it).
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - of tuple, not needed
    start: int
    data: torch.Tensor


class Pieces(tuple[Piece, ...]):
    """Pieces that come again, the same object with the same addresses.

    Attributes:
        memo: Where a receiver keeps what it worked out for them; it goes when they go.
    """

    memo: Any = None


@dataclass(frozen=True)
class Bucket:
    """Bytes `start` to `stop` of the flat buffer, and the parts of entries that they hold."""

    index: int
    start: int
    stop: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


def check_length(bucket_bytes: int) -> int:
    """Return the length. Raises `ValueError` for one that no tensor could be cut at."""
    if bucket_bytes <= 0 or bucket_bytes % BLOCK_BYTES:
        raise ValueError(f"bucket_bytes={bucket_bytes} must be a positive multiple of {BLOCK_BYTES}")
    return bucket_bytes


def cut(manifest: Manifest, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cut a manifest's flat buffer into buckets of at most `bucket_bytes` (a multiple of `BLOCK_BYTES`)."""
    check_length(bucket_bytes)
    buckets: list[Bucket] = []
    parts: list[Part] = []
    start = 0

    def close(stop: int) -> None:
        nonlocal start
        if stop > start:
            buckets.append(Bucket(len(buckets), start, stop, tuple(parts)))
            parts.clear()
            start = stop

    for index, entry in enumerate(manifest.entries):
        done = 0
        while done < entry.nbytes:
            at = entry.offset + done
            room = start + bucket_bytes - at
            left = entry.nbytes - done
            count = left if left <= room else room // BLOCK_BYTES * BLOCK_BYTES
            if count <= 0:
                close(at)
                continue
            parts.append(Part(index, done, count, at))
            done += count
    close(manifest.total_bytes)
    return tuple(buckets)


def pieces(manifest: Manifest, parts: Iterable[Part], bytes_of: Callable[[Part], torch.Tensor]) -> Pieces:
    """Typed views of parts, given the uint8 view of each."""
    found = []
    for part in parts:
        entry = manifest.entries[part.index]
        dtype = DTYPES[entry.dtype]
        data = bytes_of(part).view(dtype)
        whole = part.nbytes == entry.nbytes
        found.append(Piece(part.index, part.start // dtype.itemsize, data.view(entry.shape) if whole else data))
    return Pieces(found)


def runs(parts: Iterable[Part], bytes_of: Callable[[Part], torch.Tensor]) -> Runs:
    """The same as the digest wants them."""
    return Runs(Run(part.offset, bytes_of(part)) for part in parts)


def within(buffer: torch.Tensor, bucket: Bucket) -> Callable[[Part], torch.Tensor]:
    """Where a part lies in a buffer (uint8, `[bucket.nbytes]`)."""
    return lambda part: buffer[part.offset - bucket.start : part.offset - bucket.start + part.nbytes]


class Packer:
    """Copies a source's tensors into buckets.

    What was worked out for a layout and a set of buffers is kept: where every part of every bucket goes.

    Args:
        manifest: Says which tensor lies where.
        bucket_bytes: Where its flat buffer is cut.
    """

    def __init__(self, manifest: Manifest, bucket_bytes: int) -> None:
        """Nothing is packed yet."""
        self._manifest = manifest
        self._buckets = cut(manifest, bucket_bytes)
        self._places: dict[tuple[int, int], tuple[torch.Tensor, Runs]] = {}

    def runs(self, bucket: Bucket, buffer: torch.Tensor) -> Runs:
        """A bucket's parts in a buffer. The gaps between them are never written, nor read."""
        key = (bucket.index, buffer.data_ptr())
        known = self._places.get(key)
        if known is None:
            known = buffer, runs(bucket.parts, within(buffer, bucket))
            self._places[key] = known
        return known[1]

    def pack(
        self, tensors: Iterable[tuple[str, torch.Tensor]], buffer_for: Callable[[Bucket], torch.Tensor]
    ) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """Fill bucket after bucket, yielding each as soon as it is full.

        Args:
            tensors: Named tensors in the manifest's order, contiguous or not. Each is read (on a device: its
                copy is queued on the current stream) before the next is asked for.
            buffer_for: Gives the uint8 buffer (`[bucket.nbytes]`) of a bucket. It is asked only when the bucket
                before has been yielded and taken, so it may wait for a buffer to be free.

        Yields:
            Each bucket with its buffer. Raises `ManifestError` where a tensor is not what the
            manifest says or the source yields too few or too many.
        """
        source = iter(tensors)
        entry_at = -1
        data = torch.empty(0)
        for bucket in self._buckets:
            buffer = buffer_for(bucket)
            for part, place in zip(bucket.parts, self.runs(bucket, buffer), strict=True):
                while entry_at < part.index:
                    entry_at += 1
                    data = _taken(source, self._manifest.entries[entry_at])
                copy_bytes(place.data, data[part.start : part.start + part.nbytes])
            yield bucket, buffer
        for entry in self._manifest.entries[entry_at + 1 :]:
            _taken(source, entry)  # empty ones
        extra = next(source, None)
        if extra is not None:
            raise _changed(f"yields {extra[0]!r} beyond its metadata")

    def pack_held(
        self, tensors: Sequence[torch.Tensor], buffer_for: Callable[[Bucket], torch.Tensor]
    ) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """Like `pack`, for tensors that all stay where they are: one batch of copies a bucket.

        Args:
            tensors: One per entry, of its dtype and shape (not checked again).
            buffer_for: As in `pack`.
        """
        flat: dict[int, torch.Tensor] = {}
        for bucket in self._buckets:
            buffer = buffer_for(bucket)
            batches: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
            for part, place in zip(bucket.parts, self.runs(bucket, buffer), strict=True):
                data = flat.get(part.index)
                if data is None:
                    data = flat[part.index] = as_bytes(tensors[part.index])
                data = data[part.start : part.start + part.nbytes]
                if data.data_ptr() == place.data.data_ptr():
                    continue  # it lives there
                dtype = torch.int64 if part.nbytes % 8 == 0 and data.data_ptr() % 8 == 0 else torch.uint8
                places, sources = batches.setdefault(dtype, ([], []))
                places.append(place.data.view(dtype))
                sources.append(data.view(dtype))
            for places, sources in batches.values():
                copy_all(places, sources)
            yield bucket, buffer
            flat = {index: data for index, data in flat.items() if index == bucket.parts[-1].index}


class Packers:
    """What was worked out for a layout, kept from push to push."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._packer: tuple[str, int, Packer] | None = None
        self._runs: tuple[str, list[int], Runs] | None = None

    def of(self, manifest: Manifest, bucket_bytes: int) -> Packer:
        """The packer for buckets of a length."""
        layout = manifest.layout_id()
        if self._packer is None or self._packer[:2] != (layout, bucket_bytes):
            self._packer = layout, bucket_bytes, Packer(manifest, bucket_bytes)
        return self._packer[2]

    def runs(self, manifest: Manifest, held: Sequence[torch.Tensor]) -> Runs:
        """Tensors as the digest wants them, where they lie."""
        layout, addresses = manifest.layout_id(), [tensor.data_ptr() for tensor in held]
        if self._runs is None or self._runs[:2] != (layout, addresses):
            pairs = zip(manifest.entries, held, strict=True)
            runs = Runs(Run(entry.offset, as_bytes(tensor)) for entry, tensor in pairs if entry.nbytes)
            self._runs = layout, addresses, runs
        return self._runs[2]


def copy_all(places: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source to its place: in one batch on a device."""
    if places and places[0].is_cuda and sources[0].is_cuda:
        torch._foreach_copy_(places, sources, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
        return
    for place, source in zip(places, sources, strict=True):
        place.copy_(source)


def copy_bytes(place: torch.Tensor, source: torch.Tensor) -> None:
    """Copy bytes unless they are there already."""
    if place.data_ptr() != source.data_ptr():
        place.copy_(source)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in row-major order: a view where it is contiguous, else a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _taken(source: Iterator[tuple[str, torch.Tensor]], entry: Entry) -> torch.Tensor:
    name, tensor = next(source, (None, None))
    if name is None or tensor is None:
        raise _changed(f"ended before {entry.name!r}")
    meta = describe(name, tensor)
    if (meta.name, meta.dtype, meta.shape) != (entry.name, entry.dtype, entry.shape):
        raise _changed(
            f"yields {name!r} {meta.dtype} {list(meta.shape)} where its metadata say "
            f"{entry.name!r} {entry.dtype} {list(entry.shape)}"
        )
    return as_bytes(tensor)


def _changed(text: str) -> ManifestError:
    return ManifestError(f"the source {text}: metadata and iteration must agree", stage="transfer")
