"""The manifest: which tensors a transaction carries, where each lies, and the digest of it all.

A manifest comes from another process, so decoding trusts nothing: unknown fields, wrong types, overlaps,
sizes that do not follow from shape and dtype, and anything over a limit are `ManifestError`s.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable

import msgspec
import torch

from miles_sync.errors import ManifestError

ALIGNMENT = 64
"""Bytes. Every tensor starts on such a boundary: a cache line, and more than any vector load needs."""

MAX_ENTRIES = 1_000_000
MAX_NAME_CHARS = 512
MAX_DIMS = 8
MAX_TOTAL_BYTES = 1 << 44  # 16 TiB: above any model, below what overflows when offsets are added

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""The dtypes that travel, by the name they have in a manifest."""

_DIGEST = re.compile(r"[0-9a-f]{32}|")


class TensorMeta(msgspec.Struct, frozen=True):
    """What is known of a tensor before its bytes: name, dtype name (a key of `DTYPES`), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor of a manifest: what it is and which bytes of the flat buffer it occupies."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, dict=True):
    """The contents of one transaction.

    Attributes:
        version: The weights' version, 0 or more.
        entries: In the order of their offsets, each starting on a multiple of `ALIGNMENT`.
        total_bytes: Length of the flat buffer; the gaps between entries are zero bytes.
        digest: 32 hex digits over entries and bytes (see `miles_sync.digest`); "" until all bytes are packed.
    """

    version: int
    entries: tuple[Entry, ...]
    total_bytes: int
    digest: str = ""

    def layout_id(self) -> str:
        """32 hex digits that name the entries and total: equal ids mean equal layouts. Worked out once."""
        known = vars(self).get("layout")
        if known is None:
            content = msgspec.msgpack.encode((self.entries, self.total_bytes))
            known = vars(self)["layout"] = hashlib.blake2b(content, digest_size=16).hexdigest()
        return known

    def with_version(self, version: int) -> Manifest:
        """The same layout for another version."""
        other = Manifest(version, self.entries, self.total_bytes)
        vars(other)["layout"] = self.layout_id()
        return other


def describe(name: str, tensor: torch.Tensor) -> TensorMeta:
    """Take a tensor's metadata. Raises `ManifestError` for a dtype that does not travel."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ManifestError(
            f"tensor {name!r} has dtype {tensor.dtype}; one of {', '.join(DTYPES)} can be sent",
            stage="begin",
        )
    return TensorMeta(name, dtype, tuple(tensor.shape))


def lay_out(metas: Iterable[TensorMeta], version: int) -> Manifest:
    """Place tensors one after the other on aligned offsets.

    Args:
        metas: In the order in which the source will yield them.
        version: The weights' version.

    Returns:
        A manifest without a digest. Raises `ManifestError` where it would break a rule of `check`.
    """
    entries: list[Entry] = []
    end = 0
    for meta in metas:
        nbytes = meta.nbytes
        entries.append(Entry(meta.name, meta.dtype, tuple(meta.shape), end, nbytes))
        end = _aligned(end + nbytes)
    manifest = Manifest(version, tuple(entries), end)
    check(manifest)
    return manifest


def encode(manifest: Manifest) -> bytes:
    """Write a manifest as msgpack."""
    return msgspec.msgpack.encode(manifest)


def decode(data: bytes) -> Manifest:
    """Read a manifest from another process. Raises `ManifestError` for anything that is not one."""
    try:
        manifest = msgspec.msgpack.decode(data, type=Manifest, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"not a manifest: {error}", stage="begin") from error
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Hold a manifest to its rules. Raises `ManifestError` naming the first that it breaks."""
    entries = manifest.entries
    _require(manifest.version >= 0, f"version={manifest.version} must be 0 or more")
    _require(len(entries) > 0, "it names no tensors: nothing would be sent")
    _require(len(entries) <= MAX_ENTRIES, f"{len(entries)} entries, at most {MAX_ENTRIES}")
    _require(_DIGEST.fullmatch(manifest.digest) is not None, "digest must be 32 hex digits or empty")
    end = 0
    names: set[str] = set()
    for entry in entries:
        _check_entry(entry)
        _require(entry.name not in names, f"tensor {entry.name!r} appears twice")
        names.add(entry.name)
        _require(
            entry.offset == end,
            f"tensor {entry.name!r} starts at byte {entry.offset}, expected {end}",
        )
        end = _aligned(entry.offset + entry.nbytes)
    _require(
        manifest.total_bytes == end <= MAX_TOTAL_BYTES,
        f"total_bytes={manifest.total_bytes} must be {end} and at most {MAX_TOTAL_BYTES}",
    )


def views(entries: Iterable[Entry], flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cut the flat buffer (uint8, `[total_bytes]`) into the tensors it holds: views, no copies."""
    return {
        entry.name: flat[entry.offset : entry.offset + entry.nbytes].view(DTYPES[entry.dtype]).view(entry.shape)
        for entry in entries
    }


def _check_entry(entry: Entry) -> None:
    name = entry.name
    _require(0 < len(name) <= MAX_NAME_CHARS, f"name of {len(name)} characters, 1 to {MAX_NAME_CHARS}")
    _require(entry.dtype in DTYPES, f"tensor {name!r} has unknown dtype {entry.dtype!r}")
    _require(len(entry.shape) <= MAX_DIMS, f"tensor {name!r} has {len(entry.shape)} dimensions")
    _require(all(size >= 0 for size in entry.shape), f"tensor {name!r} has shape {entry.shape}")
    nbytes = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
    _require(entry.nbytes == nbytes, f"tensor {name!r} has nbytes={entry.nbytes}, shape gives {nbytes}")
    _require(nbytes <= MAX_TOTAL_BYTES, f"tensor {name!r} has {nbytes} bytes")


def _require(rule: bool, text: str) -> None:
    if not rule:
        raise ManifestError(f"manifest refused: {text}", stage="begin")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
