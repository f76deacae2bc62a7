"""Safetensors files, read and written with nothing but numpy and torch: 8 bytes of length, a JSON header, the bytes.

A file may come from anywhere, so the header is trusted in nothing: lengths, dtypes, shapes and offsets are checked
before a tensor is made of them.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from miles_sync.errors import CorruptError, ManifestError
from miles_sync.manifest import DTYPES, TensorMeta, describe

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# The format's names for the dtypes that travel.
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {short: name for name, short in _NAMES.items()}


def header_of(path: Path) -> tuple[list[tuple[TensorMeta, int]], dict[str, str], int]:
    """Read a file's header.

    Returns:
        Each tensor with the position of its first byte in the file, in that order; the metadata; the length that the
        file has. Raises `CorruptError` where it is missing, cut short, or no such file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise _corrupt(path, f"a header of {length} bytes")
            header = json.loads(file.read(length))
            found = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _corrupt(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _corrupt(path, f"no header: {error}") from error
    start, end, tensors = 8 + length, 8 + length, []
    try:
        notes = header.pop("__metadata__", {})
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            meta = TensorMeta(name, _DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
            first, last = entry["data_offsets"]
            if min(meta.shape, default=0) < 0 or start + first != end or last - first != meta.nbytes:
                raise _corrupt(path, f"{name!r} does not lie where the tensor before it ends")
            tensors.append((meta, end))
            end = start + last
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"a header that makes no sense: {error!r}") from error
    if found != end:
        raise _corrupt(path, f"{found} bytes where its header says {end}")
    return tensors, {str(key): str(value) for key, value in notes.items()}, end


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map a file: its tensors, which must not be written, and its metadata. Raises `CorruptError`."""
    tensors, notes, _ = header_of(path)
    with path.open("rb") as file:
        # A private mapping: torch wants writable memory, the file stays as it is.
        data = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    found = {}
    for meta, at in tensors:
        dtype = DTYPES[meta.dtype]
        if not meta.nbytes:
            found[meta.name] = torch.empty(meta.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(data, dtype=torch.uint8, count=meta.nbytes, offset=at)
        flat = flat if at % dtype.itemsize == 0 else flat.clone()
        found[meta.name] = flat.view(dtype).view(meta.shape)
    return found, notes


def write(path: Path, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> int:
    """Write a file and see that it is on the disk. Returns its length."""
    header: dict[str, Any] = {"__metadata__": dict(notes)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        meta = describe(name, tensor)
        header[name] = {"dtype": _NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 64)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(memoryview(flat.numpy()))
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


class Checkpoint:
    """The tensors of a directory of safetensors files, in the order of names, as a source: mapped, not read at once."""

    def __init__(self, directory: Path) -> None:
        """Read the headers. Raises `ManifestError` where there is no such file."""
        self._files = sorted(directory.glob("*.safetensors"))
        if not self._files:
            raise ManifestError(f"{directory} holds no *.safetensors", stage="begin")
        self._where = {meta.name: (meta, path) for path in self._files for meta, _ in header_of(path)[0]}

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, dtype and shape of each tensor."""
        return [self._where[name][0] for name in sorted(self._where)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors."""
        files = {path: read(path)[0] for path in self._files}
        for name in sorted(self._where):
            yield name, files[self._where[name][1]][name]


def _corrupt(path: Path, reason: str) -> CorruptError:
    return CorruptError(f"{path}: {reason}", stage="transfer")
