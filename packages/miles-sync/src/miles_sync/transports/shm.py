"""Shared memory: the sender packs into a segment as long as the flat buffer, receivers read it where it lies.

A segment is anonymous memory (`memfd_create`), not a file: no size limit of /dev/shm applies, and a killed process
leaves nothing behind. It is opened through /proc/PID/fd, which the kernel allows to the same user (or root) alone, and
it carries seals: it can be neither shrunk nor grown, so that a mapping never ends the reading process with SIGBUS.
Mapped once, it is kept for each sync; what a receiver mapped stays even when the sender dies, so staged mode needs no
copy of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
from pathlib import Path

import torch

from miles_sync.buckets import Bucket, within
from miles_sync.channel import Deadline
from miles_sync.errors import TransportError
from miles_sync.transports import Hear, Place, Stream, wait_until

_ADDRESS = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,7} (miles-sync-[0-9a-f]{32}) ([0-9]{1,16})")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """Shared memory that this process made.

    Attributes:
        data: The mapping, uint8 `[nbytes]`, zero at first.
        address: Under which other processes of this user can map it, as long as this one holds it.
    """

    def __init__(self, nbytes: int) -> None:
        """Make and map it. Raises `TransportError` where the system has none or too little."""
        if nbytes > available_bytes():
            raise TransportError(f"no room for {nbytes} bytes: {available_bytes()} are free", stage="begin")
        name = f"miles-sync-{secrets.token_hex(16)}"
        try:
            file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, AttributeError) as error:
            raise TransportError(f"no anonymous shared memory here: {error}", stage="begin") from error
        self._file = file
        try:
            os.ftruncate(file, max(nbytes, 1))
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            self.data = _mapped(file, nbytes)
        except OSError as error:
            self.close()
            raise TransportError(f"no room for {nbytes} bytes of shared memory: {error.strerror}", stage="begin") from (
                error
            )
        self.address = f"/proc/{os.getpid()}/fd/{file} {name} {nbytes}"

    def close(self) -> None:
        """Close it: nobody can open it any more. The mapping goes with the last tensor over it."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def open_segment(address: str) -> torch.Tensor:
    """Map another process's segment. Raises `TransportError` where it is missing, another's, or not sealed."""
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise TransportError(f"{address!r} is not a segment of ours", stage="transfer")
    name, nbytes = match[1], int(match[2])
    path = address.split(" ")[0]
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        reason = f"{path}: {error.strerror}; are both processes of one user, on one machine?"
        raise TransportError(reason, stage="transfer") from error
    try:
        found = os.readlink(f"/proc/self/fd/{file}")
        if not found.startswith(f"/memfd:{name}"):
            raise TransportError(f"{path} is {found}, not {name}: another machine's process?", stage="transfer")
        if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(file).st_size < nbytes:
            raise TransportError(f"{name} must be sealed and hold {nbytes} bytes", stage="transfer")
        return _mapped(file, nbytes)
    except OSError as error:
        raise TransportError(f"{name} cannot be mapped: {error.strerror}", stage="transfer") from error
    finally:
        os.close(file)


def available_bytes() -> int:
    """Memory that a new segment could take, as the kernel estimates it."""
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


class ShmOutlet:
    """The sender's end. Bytes are where they belong once packed."""

    kind = "shm"
    says = True

    def __init__(self, segment: Segment) -> None:
        """Send what lies in a segment, the caller's or one made for this."""
        self.segment = segment
        self.address = segment.address

    def detail(self, rank: int) -> bytes:
        """The address says it all."""
        return b""

    def attach(self, deadline: Deadline, hear: Hear) -> None:
        """Nothing to do: receivers map what they are told."""

    def buffer(self, bucket: Bucket, patience_s: float, hear: Hear) -> torch.Tensor:
        """Its place in the segment."""
        return self.segment.data[bucket.start : bucket.stop]

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Nothing to do: packing wrote into the segment."""

    def flush(self, patience_s: float, hear: Hear) -> None:
        """Nothing to do: every bucket has a place of its own."""

    def close(self) -> None:
        """Nothing to do: whoever made the segment closes it."""


class ShmInlet:
    """A receiver's end: gives views of the sender's segment."""

    lasting = True
    device = torch.device("cpu")

    def __init__(self, address: str) -> None:
        """Map the segment."""
        self.address = address
        self._data: torch.Tensor | None = open_segment(address)

    def start(self, stream: Stream) -> None:
        """Check its length."""
        self._stream = stream
        needed = stream.buckets[-1].stop if stream.buckets else 0
        if self._data is None or self._data.numel() < needed:
            raise TransportError(f"the segment must hold {needed} bytes", stage="transfer")

    def receive(self, bucket: Bucket) -> Place:
        """Wait until the sender has said that the bucket is packed."""
        stream, data = self._stream, self._data
        assert data is not None
        wait_until(lambda: stream.filled >= bucket.stop, stream.patience_s, stream.hear, "shm")
        return Place(data.data_ptr(), within(data[bucket.start : bucket.stop], bucket))

    def release(self, bucket: Bucket) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Drop the mapping."""
        self._data = None


def read_probe(address: str) -> str:
    """Read the 32 characters in a probe segment: proof that two processes share memory."""
    return bytes(open_segment(address).tolist()).decode("ascii", "replace")


def _mapped(file: int, nbytes: int) -> torch.Tensor:
    # Populated at once: a fault per 4 KiB would cost the first sync more than its copies.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return torch.frombuffer(mmap.mmap(file, max(nbytes, 1), flags=flags), dtype=torch.uint8)[:nbytes]
