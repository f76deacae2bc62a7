"""Tensors of safetensors files, mapped into memory and let go of again: reading needs no memory of its own.

Pages that were touched stay resident as long as a file is mapped. A rank that reads its share of a model would so hold
the share twice, once as parameters and once as pages of files. `MappedFiles` gives a region's pages back as soon as its
reader is done with it.
"""

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from miles_core.errors import InputError

# safetensors' spelling of the dtypes that model directories hold.
DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SPELLING: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a directory lies.

    Attributes:
        file: the safetensors file.
        dtype: in safetensors' spelling, e.g. "F32" or "BF16".
        shape: as stored.
        offset: of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch.

        Raises:
            InputError: torch has none, or none that a model directory should hold.
        """
        if self.dtype not in DTYPES:
            raise InputError(
                f"dtype of a tensor in {self.file}",
                self.dtype,
                f"must be one of {', '.join(DTYPES)}",
                "Save the model in bfloat16, float16, float32 or FP8 with block scales.",
            )
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


class MappedFiles:
    """Reads tensors of a directory; each file is mapped once, never read whole. Calling it copies one tensor."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        """Nothing is opened yet.

        Args:
            tensors: where each lies.
        """
        self._tensors = tensors
        self._files: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Unmap; a view that somebody kept keeps its file mapped."""
        self._files.clear()

    def __call__(self, name: str) -> Tensor:
        """A copy of one whole tensor."""
        with self.whole(name) as tensor:
            return tensor.clone()

    @contextmanager
    def whole(self, name: str) -> Iterator[Tensor]:
        """One whole tensor, which must not be used after the context: its pages are given back."""
        shape = self._tensors[name].shape
        with self.region(name, [0] * len(shape), shape) as tensor:
            yield tensor

    @contextmanager
    def region(self, name: str, start: Sequence[int], size: Sequence[int]) -> Iterator[Tensor]:
        """A box of one tensor, which must not be used after the context: its pages are given back.

        Args:
            name: the tensor.
            start: first index along each dim.
            size: extent along each dim.
        """
        stored = self._tensors[name]
        if 0 in size:
            yield torch.empty(tuple(size), dtype=stored.torch_dtype)
            return
        file = self._map(stored.file)
        # Private pages, never written: torch warns of buffers that cannot be.
        tensor = torch.frombuffer(file, dtype=stored.torch_dtype, count=math.prod(stored.shape), offset=stored.offset)
        tensor = tensor.view(stored.shape)
        for dim, (first, extent) in enumerate(zip(start, size, strict=True)):
            tensor = tensor.narrow(dim, first, extent)
        yield tensor
        _give_back(file, stored.offset, tensor)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._files:
            with path.open("rb") as stream:
                self._files[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._files[path]


def _give_back(file: mmap.mmap, offset: int, tensor: Tensor) -> None:
    """Drop the pages from the tensor's first to its last element; what neighbours share is read again.

    `offset` is that of the storage in the file.
    """
    item = tensor.element_size()
    last = int(sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True)))
    first = offset + int(tensor.storage_offset()) * item
    page = first // mmap.PAGESIZE * mmap.PAGESIZE
    file.madvise(mmap.MADV_DONTNEED, page, first + (last + 1) * item - page)
