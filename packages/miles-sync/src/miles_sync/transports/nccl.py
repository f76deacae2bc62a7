"""NCCL: buckets are broadcast from device to device, to one receiver or to several along one chain.

One communicator holds the sender (rank 0) and its receivers, made when they are attached and warmed up then. Two
buffers a side: while one bucket travels, the sender packs the next and the receivers install the one before.
"""

from __future__ import annotations

import secrets

import msgspec
import torch

from miles_sync.buckets import Bucket
from miles_sync.channel import Deadline
from miles_sync.errors import TransportError
from miles_sync.transports import Hear, Place, Stream, wait_until
from miles_sync.transports.device import BUFFERS, Ring, Window
from miles_sync.transports.libnccl import ID_BYTES, Communicator, unique_id, version

_WARM_BYTES = 1 << 25  # long enough to connect every channel that a bucket will use


class _Detail(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    unique: bytes
    rank: int
    size: int


class NcclOutlet:
    """The sender's end."""

    kind = "nccl"
    says = False

    def __init__(self, device: torch.device, receivers: int, bucket_bytes: int) -> None:
        """Allocate the buffers. Raises `TransportError` where NCCL is not here."""
        self._device = device
        self._size = receivers + 1
        self._unique = unique_id()
        self.address = f"nccl {secrets.token_hex(8)}"
        self._communicator: Communicator | None = None
        self._window = Window("NCCL broadcast")
        self._stream = torch.cuda.Stream(device, priority=-1)
        length = max(bucket_bytes, _WARM_BYTES)
        self._buffers = [torch.zeros(length, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        self._sent: list[torch.cuda.Event | None] = [None] * BUFFERS

    def detail(self, rank: int) -> bytes:
        """The communicator's id, the receiver's rank, and the size."""
        return msgspec.msgpack.encode(_Detail(self._unique, rank, self._size))

    def attach(self, deadline: Deadline, hear: Hear) -> None:
        """Make the communicator together with the receivers."""
        self._communicator = Communicator(self._unique, 0, self._size, self._device, deadline.left(), hear)
        _warm(self._communicator, self._buffers[0], self._stream, deadline, hear)

    def buffer(self, bucket: Bucket, patience_s: float, hear: Hear) -> torch.Tensor:
        """One of the two; what is queued on the current stream from now on waits until it is free."""
        assert self._communicator is not None
        self._communicator.hear = hear
        sent = self._sent[bucket.index % BUFFERS]
        if sent is not None:
            self._window.add(sent, patience_s, hear)
            torch.cuda.current_stream(self._device).wait_event(sent)
        return self._buffers[bucket.index % BUFFERS][: bucket.nbytes]

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Queue the broadcast behind the packing."""
        assert self._communicator is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._communicator.broadcast(buffer, 0, self._stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        self._sent[bucket.index % BUFFERS] = event

    def flush(self, patience_s: float, hear: Hear) -> None:
        """Wait for all, in order."""
        assert self._communicator is not None
        self._window.drain(patience_s, hear)
        for event in self._sent:
            if event is not None:
                wait_until(event.query, patience_s, hear, "NCCL broadcast")
        self._sent = [None] * BUFFERS
        self._communicator.check()

    def close(self) -> None:
        """Give up the communicator."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort()
        self._window.clear()
        self._sent = [None] * BUFFERS


class NcclInlet:
    """A receiver's end."""

    lasting = False

    def __init__(self, address: str, detail: bytes, device: torch.device, deadline: Deadline, hear: Hear) -> None:
        """Join the communicator. Raises `TransportError` where the receiver's weights are on no GPU."""
        if device.type != "cuda":
            raise TransportError(f"NCCL needs weights on a GPU, these are on {device}", stage="transfer")
        try:
            spec = msgspec.msgpack.decode(detail, type=_Detail)
        except msgspec.DecodeError as error:
            raise TransportError(f"NCCL: bad detail: {error}", stage="transfer") from error
        if len(spec.unique) != ID_BYTES:
            raise TransportError(f"NCCL: an id of {len(spec.unique)} bytes", stage="transfer")
        self.address = address
        self.device = device
        self._ring = Ring(device, "NCCL broadcast")
        self._communicator = Communicator(spec.unique, spec.rank, spec.size, device, deadline.left(), hear)
        warm = torch.empty(_WARM_BYTES, dtype=torch.uint8, device=device)
        _warm(self._communicator, warm, self._ring.stream, deadline, hear)

    def start(self, stream: Stream) -> None:
        """Queue the first broadcasts."""
        self._communicator.hear = stream.hear
        self._ring.start(stream, lambda bucket, buffer: self._communicator.broadcast(buffer, 0, self._ring.stream))

    def receive(self, bucket: Bucket) -> Place:
        """The next bucket."""
        return self._ring.receive(bucket)

    def release(self, bucket: Bucket) -> None:
        """Queue the broadcast that takes its buffer."""
        self._ring.release(bucket)

    def close(self) -> None:
        """Give up the communicator."""
        self._communicator.abort()


def reason_against() -> str:
    """Why NCCL cannot be used in this process; "" where it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        version()
    except TransportError as error:
        return error.reason
    return ""


def _warm(
    communicator: Communicator, buffer: torch.Tensor, stream: torch.cuda.Stream, deadline: Deadline, hear: Hear
) -> None:
    """The first broadcast connects the ranks and loads kernels: not in the first sync."""
    stream.wait_stream(torch.cuda.current_stream(buffer.device))
    communicator.broadcast(buffer[:_WARM_BYTES], 0, stream)
    event = torch.cuda.Event()
    event.record(stream)
    wait_until(event.query, deadline.left(), hear, "NCCL warm-up")
