"""NCCL by its C interface: one communicator of our own, that can be given up at any moment.

Why not torch's `ProcessGroupNCCL`: its watchdog ends the process when a collective times out, and an engine must
survive a trainer that died. Here the communicator is non-blocking (`ncclConfig_t.blocking = 0`): every call returns,
its state is polled with a deadline, and `ncclCommAbort` ends what hangs. The 128-byte id that the ranks meet by travels
on the authenticated control channel; no store is needed. The interface is that of nccl.h 2.18 and later.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from miles_sync.errors import PeerLostError, SyncError, TransportError
from miles_sync.transports import Hear, wait_until

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNDEFINED = -(1 << 31)
_MAGIC = 0xCAFEBEEF
_CONFIG_VERSION = 21800  # fields up to splitShare; newer libraries fill in the rest
_OLDEST = 21800
_ABORT_S = 5.0

ID_BYTES = 128


class _UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * ID_BYTES)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cgaClusterSize", ctypes.c_int),
        ("minCTAs", ctypes.c_int),
        ("maxCTAs", ctypes.c_int),
        ("netName", ctypes.c_char_p),
        ("splitShare", ctypes.c_int),
        ("trafficClass", ctypes.c_int),  # where 2.18 has padding, newer libraries read this
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded, or else the one of its wheel."""
    errors = []
    for name in ("libnccl.so.2", *_wheels()):
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            errors.append(str(error))
            continue
        _declare(library)
        version = ctypes.c_int()
        if library.ncclGetVersion(ctypes.byref(version)) or version.value < _OLDEST:
            errors.append(f"{name} is version {version.value}, {_OLDEST} is needed")
            continue
        return library
    raise TransportError(f"NCCL is not here: {'; '.join(errors)}", stage="begin")


def _wheels() -> list[str]:
    spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    return [str(path) for place in places for path in Path(place).glob("lib/libnccl.so.2")]


def _declare(library: ctypes.CDLL) -> None:
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclGetUniqueId.argtypes = [ctypes.POINTER(_UniqueId)]
    library.ncclCommInitRankConfig.argtypes = [
        ctypes.POINTER(pointer), number, _UniqueId, number, ctypes.POINTER(_Config),
    ]  # fmt: skip
    library.ncclCommGetAsyncError.argtypes = [pointer, ctypes.POINTER(number)]
    library.ncclCommAbort.argtypes = [pointer]
    library.ncclBroadcast.argtypes = [pointer, pointer, size, number, number, pointer, pointer]


def version() -> int:
    """Of the library: 22809 is 2.28.9. Raises `TransportError` where there is none."""
    found = ctypes.c_int()
    _library().ncclGetVersion(ctypes.byref(found))
    return found.value


def unique_id() -> bytes:
    """A new id, by which ranks meet. Raises `TransportError`."""
    found = _UniqueId()
    result = _library().ncclGetUniqueId(ctypes.byref(found))
    if result:
        raise TransportError(f"ncclGetUniqueId: {_text(result)}", stage="begin")
    return bytes(found)


class Communicator:
    """One rank of a communicator on one device. Calls are queued on the given streams.

    Args:
        unique: From `unique_id`, the same for all ranks.
        rank: This one's.
        size: How many there are.
        device: One that no other rank has.
        patience_s: How long nothing may move.
        hear: Called while waiting.
    """

    def __init__(
        self, unique: bytes, rank: int, size: int, device: torch.device, patience_s: float, hear: Hear
    ) -> None:
        """Meet the other ranks. Raises `DeadlineError`, `TransportError`, and what `hear` raises."""
        self._library = _library()
        self._device = device
        self._patience_s = patience_s
        self.hear = hear
        self._handle: ctypes.c_void_p | None = ctypes.c_void_p()
        config = _Config(ctypes.sizeof(_Config), _MAGIC, _CONFIG_VERSION, 0, *[_UNDEFINED] * 3, None, *[_UNDEFINED] * 2)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the device's context this thread's
            try:
                self._do(
                    "ncclCommInitRankConfig",
                    lambda: self._library.ncclCommInitRankConfig(
                        ctypes.byref(self._handle),  # type: ignore[arg-type]
                        size,
                        _UniqueId.from_buffer_copy(unique),
                        rank,
                        ctypes.byref(config),
                    ),
                )
            except SyncError:
                self.abort()
                raise

    def broadcast(self, data: torch.Tensor, root: int, stream: torch.cuda.Stream) -> None:
        """Bring `data` (uint8, contiguous) of rank `root` to all ranks."""
        address = data.data_ptr()
        self._do(
            "ncclBroadcast",
            lambda: self._library.ncclBroadcast(
                address, address, data.numel(), _UINT8, root, self._handle, stream.cuda_stream
            ),
        )

    def check(self) -> None:
        """Raise `PeerLostError` where the communicator has failed."""
        self._state("NCCL")

    def abort(self) -> None:
        """Give it up: whatever hangs in it ends. Waits a few seconds at most; safe to call twice."""
        handle, self._handle = self._handle, None
        if handle is not None and handle.value:
            thread = threading.Thread(target=self._abort, args=(handle,), name="miles-sync-abort", daemon=True)
            thread.start()
            thread.join(_ABORT_S)

    def _abort(self, handle: ctypes.c_void_p) -> None:
        with torch.cuda.device(self._device):
            self._library.ncclCommAbort(handle)

    def _do(self, name: str, call: Callable[[], int]) -> None:
        """Make a call, and wait until it is queued: other calls must not come before."""
        if self._handle is None:
            raise TransportError(f"{name}: the communicator is closed", stage="transfer")
        with torch.cuda.device(self._device):
            result = call()
        if result not in (_SUCCESS, _IN_PROGRESS):
            raise TransportError(f"{name}: {_text(result)}", stage="transfer")
        if result == _IN_PROGRESS or name == "ncclCommInitRankConfig":
            wait_until(lambda: self._state(name) == _SUCCESS, self._patience_s, self.hear, name)

    def _state(self, name: str) -> int:
        if self._handle is None:
            raise PeerLostError(f"{name}: the communicator was given up", stage="transfer")
        state = ctypes.c_int()
        result = self._library.ncclCommGetAsyncError(self._handle, ctypes.byref(state)) or state.value
        if result not in (_SUCCESS, _IN_PROGRESS):
            raise PeerLostError(f"{name}: {_text(result)}", stage="transfer")
        return result


def _text(result: int) -> str:
    return _library().ncclGetErrorString(result).decode("ascii", "replace")
