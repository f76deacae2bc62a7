"""CUDA IPC: receivers on the same host map the memory that holds the sender's tensors, and read it where it lies.

No packing and no buffers on the sender's side: what travels once is one handle for each allocation (64 bytes, from the
driver, no pickle) and where each tensor lies in which. On the sender's own GPU a receiver installs straight from the
mapped tensors; on another GPU it copies them over NVLink into two buffers of its own. The memory must come from plain
`cudaMalloc`; expandable segments have no such handle.
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from miles_sync.buckets import Bucket, Part
from miles_sync.channel import Deadline
from miles_sync.errors import TransportError
from miles_sync.transports import Hear, Place, Stream
from miles_sync.transports.device import Ring

_HANDLE_BYTES = 64
_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_byte * _HANDLE_BYTES)]


class Allocation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One allocation of the sender's: its handle, address there, and length."""

    handle: bytes
    base: int
    nbytes: int


class Export(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a sender's tensors lie.

    Attributes:
        process: The sender's process id and a random number: in that very process nothing needs mapping.
        device: UUID of the GPU.
        allocations: Each once.
        places: Per entry of the manifest, its allocation and byte offset.
    """

    process: tuple[int, str]
    device: str
    allocations: tuple[Allocation, ...]
    places: tuple[tuple[int, int], ...]


_NONCE = secrets.token_hex(16)


def _process() -> tuple[int, str]:
    return os.getpid(), _NONCE  # a forked child has another


class IpcOutlet:
    """The sender's end: names where the tensors lie; receivers do the rest."""

    kind = "ipc"
    says = False

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """Export the memory of tensors. Raises `TransportError` where that cannot be done."""
        self.addresses = [tensor.data_ptr() for tensor in tensors]
        self.address = f"ipc {secrets.token_hex(8)}"
        self._device = one_device(tensors)
        self._detail = msgspec.msgpack.encode(_export(tensors, self._device))

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors lie where those that were exported lay."""
        return len(tensors) == len(self.addresses) and all(
            tensor.data_ptr() == address for tensor, address in zip(tensors, self.addresses, strict=True)
        )

    def detail(self, rank: int) -> bytes:
        """The export."""
        return self._detail

    def attach(self, deadline: Deadline, hear: Hear) -> None:
        """Nothing to do: receivers map what they are told."""

    def buffer(self, bucket: Bucket, patience_s: float, hear: Hear) -> torch.Tensor:
        """There is none."""
        raise AssertionError("nothing is packed for CUDA IPC")

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Nothing to do."""

    def flush(self, patience_s: float, hear: Hear) -> None:
        """Nothing to do: receivers have read all once they have answered Verify."""

    def close(self) -> None:
        """Nothing to do: the memory is its owner's."""


class IpcInlet:
    """A receiver's end: the sender's memory, mapped once."""

    lasting = False

    def __init__(self, address: str, detail: bytes, device: torch.device) -> None:
        """Map it. Raises `TransportError` where this process does not see the sender's GPU."""
        self.address = address
        self.device = device
        try:
            self._export = msgspec.msgpack.decode(detail, type=Export)
        except msgspec.DecodeError as error:
            raise TransportError(f"CUDA IPC: bad detail: {error}", stage="transfer") from error
        if device.type != "cuda":
            raise TransportError(f"CUDA IPC needs weights on a GPU, these are on {device}", stage="transfer")
        if self._export.device not in uuids():
            raise TransportError(
                "CUDA IPC: the sender's GPU is hidden from this process: widen CUDA_VISIBLE_DEVICES", stage="transfer"
            )
        self._here = self._export.process == _process()
        self._bases: list[int] = []
        self._key = f"{address} {id(self)}"
        self._ring = Ring(device, "CUDA IPC copy")
        self._copies: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's context this thread's
            for allocation in self._export.allocations:
                self._bases.append(allocation.base if self._here else _open(allocation.handle))
        self._mapped: list[torch.Tensor] = []
        if self._export.device == uuid_of(device):
            pairs = zip(self._export.allocations, self._bases, strict=True)
            self._mapped = [_tensor_at(base, allocation.nbytes, device) for allocation, base in pairs]

    def start(self, stream: Stream) -> None:
        """Begin copying, where copies are needed."""
        self._stream = stream
        if not self._direct:
            self._ring.start(stream, self._copy)

    def receive(self, bucket: Bucket) -> Place:
        """The sender's own memory where it is on this GPU and is not to be kept; else a copy."""
        if self._direct:
            return Place(self._key, self._view)
        return self._ring.receive(bucket)

    def release(self, bucket: Bucket) -> None:
        """Go on copying."""
        if not self._direct:
            self._ring.release(bucket)

    def close(self) -> None:
        """Unmap. What was queued on the device is waited for."""
        self._mapped, bases, self._bases = [], self._bases, []
        if bases and not self._here:
            with torch.cuda.device(self.device):
                torch.cuda.synchronize()
                for base in bases:
                    _driver().cuIpcCloseMemHandle(base)

    @property
    def _direct(self) -> bool:
        return bool(self._mapped) and self._stream.into is None

    def _view(self, part: Part) -> torch.Tensor:
        which, offset = self._export.places[part.index]
        return self._mapped[which][offset + part.start : offset + part.start + part.nbytes]

    def _copy(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Queue one copy for each run of bytes that lie together on both sides."""
        key = (bucket.index, buffer.data_ptr())
        copies = self._copies.get(key)
        if copies is None:
            copies = self._copies[key] = self._planned(bucket, buffer.data_ptr())
        driver, queue = _driver(), self._ring.stream.cuda_stream
        with torch.cuda.device(self.device):
            for target, source, nbytes in copies:
                _check("cuMemcpyAsync", driver.cuMemcpyAsync(target, source, nbytes, queue))

    def _planned(self, bucket: Bucket, target: int) -> list[tuple[int, int, int]]:
        copies: list[tuple[int, int, int]] = []
        for part in bucket.parts:
            which, offset = self._export.places[part.index]
            allocation = self._export.allocations[which]
            if offset + part.start + part.nbytes > allocation.nbytes:
                raise TransportError("CUDA IPC: a tensor ends beyond its allocation", stage="transfer")
            source = self._bases[which] + offset + part.start
            at = target + part.offset - bucket.start
            if copies and copies[-1][1] + copies[-1][2] == source and copies[-1][0] + copies[-1][2] == at:
                copies[-1] = (*copies[-1][:2], copies[-1][2] + part.nbytes)
            else:
                copies.append((at, source, part.nbytes))
        return copies


def one_device(tensors: Sequence[torch.Tensor]) -> torch.device:
    """The GPU that all tensors are on. Raises `TransportError` where there is no such, or one is not contiguous."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise TransportError(f"CUDA IPC needs all tensors on one GPU, they are on {devices}", stage="begin")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise TransportError("CUDA IPC needs contiguous tensors", stage="begin")
    return next(iter(devices))


def exportable(tensors: Sequence[torch.Tensor]) -> None:
    """Raise `TransportError` where the memory of tensors cannot be mapped by another process."""
    with torch.cuda.device(one_device(tensors)):
        for base in {_range_of(tensor.data_ptr())[0] for tensor in tensors if tensor.numel()}:
            _handle_of(base)


def uuid_of(device: torch.device) -> str:
    """A GPU's UUID: what names it in every process."""
    return str(torch.cuda.get_device_properties(device).uuid)


def uuids() -> list[str]:
    """Of all GPUs that this process sees."""
    return [uuid_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _export(tensors: Sequence[torch.Tensor], device: torch.device) -> Export:
    indices: dict[int, int] = {}
    allocations: list[Allocation] = []
    places: list[tuple[int, int]] = []
    base, end = 0, 0
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        for tensor in tensors:
            address = tensor.data_ptr()
            if not tensor.numel():
                places.append((0, 0))
                continue
            if not base <= address < end:
                base, nbytes = _range_of(address)
                end = base + nbytes
            if base not in indices:
                indices[base] = len(allocations)
                allocations.append(Allocation(_handle_of(base), base, end - base))
            places.append((indices[base], address - base))
    return Export(_process(), uuid_of(device), tuple(allocations), tuple(places))


@functools.cache
def _driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportError(f"CUDA IPC: no driver: {error}", stage="begin") from error
    address, size = ctypes.c_uint64, ctypes.c_size_t
    driver.cuMemGetAddressRange_v2.argtypes = [ctypes.POINTER(address), ctypes.POINTER(size), address]
    driver.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), address]
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(address), _Handle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [address]
    driver.cuMemcpyAsync.argtypes = [address, address, size, ctypes.c_void_p]
    driver.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return driver


def _range_of(address: int) -> tuple[int, int]:
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    result = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address)
    _check("cuMemGetAddressRange", result)
    return base.value, size.value


def _handle_of(base: int) -> bytes:
    handle = _Handle()
    result = _driver().cuIpcGetMemHandle(ctypes.byref(handle), base)
    _check("cuIpcGetMemHandle (memory of expandable segments has none)", result)
    return bytes(handle)


def _open(handle: bytes) -> int:
    if len(handle) != _HANDLE_BYTES:
        raise TransportError(f"CUDA IPC: a handle of {len(handle)} bytes", stage="transfer")
    address = ctypes.c_uint64()
    result = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), _Handle.from_buffer_copy(handle), _PEER_ACCESS)
    _check("cuIpcOpenMemHandle", result)
    return address.value


def _check(name: str, result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise TransportError(f"CUDA IPC: {name}: {(text.value or b'?').decode()} ({result})", stage="transfer")


class _Raw:
    """Memory at an address, as torch takes it in without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def _tensor_at(address: int, nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_Raw(address, nbytes), device=device)
