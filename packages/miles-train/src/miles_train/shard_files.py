"""Writes safetensors files tensor by tensor, and reads them back.

`safetensors.torch.save_file` wants all tensors of a file at once. Names, dtypes and shapes are enough for the header,
so that a file can be written while its tensors still arrive.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from miles_train.errors import CheckpointError
from miles_train.tensor_files import SPELLING

_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written.

    Attributes:
        name: in the file.
        dtype: of what is written.
        shape: of the whole tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def cut_into_files(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries of consecutive files, none above `max_bytes` unless it holds one tensor alone.

    Within a file the widest dtype comes first: every tensor then lies at a multiple of its element's size.
    """
    files: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not files or size + entry.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    return [sorted(file, key=lambda entry: -entry.dtype.itemsize) for file in files]


class ShardFile:
    """A safetensors file that is being written; its tensors come in the order of its entries."""

    def __init__(self, path: Path, entries: Sequence[Entry]):
        """Create it and write its header.

        Args:
            path: a new file.
            entries: all of its tensors.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        self._waiting = list(reversed(entries))
        self._digests: dict[str, int] = {}
        self._header = _header(entries)
        self._stream = path.open("wb", buffering=0)
        try:
            _write_all(self._stream.fileno(), memoryview(self._header))
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close it."""
        self._stream.close()

    @property
    def is_full(self) -> bool:
        """Whether all tensors were written."""
        return not self._waiting

    def write(self, tensor: Tensor) -> None:
        """Append the next entry's tensor.

        Args:
            tensor: of the entry's dtype and shape, on the CPU.

        Raises:
            OSError: it cannot be written.
        """
        entry = self._waiting.pop()
        assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        self._digests[entry.name] = zlib.crc32(data)
        _write_all(self._stream.fileno(), data)

    def finish(self) -> None:
        """Bring it to the disk, read it back from there, and hold each tensor against what was written.

        Raises:
            OSError: it cannot be written or read.
            CheckpointError: something else was read than was written.
        """
        descriptor = self._stream.fileno()
        os.fsync(descriptor)
        # Else the page cache would answer, and a failing disk would not be noticed.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._stream.close()
        _compare(self.path, self._header, self._digests)


def _header(entries: Sequence[Entry]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        fields[entry.name] = {
            "dtype": SPELLING[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _compare(path: Path, header: bytes, digests: Mapping[str, int]) -> None:
    fields = json.loads(header[8:])
    with path.open("rb", buffering=0) as stream:
        if stream.read(len(header)) != header:
            raise _differs(path, "its header")
        buffer = bytearray(_BLOCK_BYTES)
        for name, digest in digests.items():
            start, end = fields[name]["data_offsets"]
            found, left = 0, end - start
            while left:
                count = stream.readinto(memoryview(buffer)[: min(left, _BLOCK_BYTES)])
                if not count:
                    raise _differs(path, name)
                found = zlib.crc32(memoryview(buffer)[:count], found)
                left -= count
            if found != digest:
                raise _differs(path, name)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _differs(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{what} in {path} did not read back as it was written: the disk may be failing.")
