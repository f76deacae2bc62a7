"""Shared memory: the sender packs into a segment of /dev/shm, the receiver reads it from there.

The sender maps the segment once and reuses it for each sync. Its name is unguessable and its mode 0600; it is
unlinked as soon as every receiver has opened it, so a killed process leaves nothing behind. What a kill between
creation and opening does leave is found by the next sender: the creator holds a lock on its segment for life, a
segment whose lock is free is swept.

The receiver does not map the segment, it reads it (`pread`): the same one copy into staging, but a segment that
was cut short gives a short read, an error with a name, where a mapping would end the receiving process with
SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import secrets
import stat

import torch

from miles_sync.channel import Deadline
from miles_sync.errors import CorruptError, TransportError

DIRECTORY = "/dev/shm"
_PREFIX = "miles-sync-"
_NAME = re.compile(r"miles-sync-[0-9a-f]{32}")
_READ_BYTES = 1 << 26  # one read call: long enough to cost nothing, short enough to notice a deadline


class Segment:
    """A segment that this process owns, mapped as a uint8 tensor.

    Attributes:
        name: Its file name in /dev/shm.
        data: The mapping, `[nbytes]`, zero at first.
    """

    def __init__(self, nbytes: int) -> None:
        """Create and map it. Raises `TransportError` where /dev/shm has no room or is missing."""
        _sweep()
        try:
            self.name, self._file = _create_locked()
        except OSError as error:
            raise TransportError(f"{DIRECTORY}: {error.strerror}", stage="begin") from error
        self._path: str | None = os.path.join(DIRECTORY, self.name)
        try:
            # Reserve the pages now: a full /dev/shm is an error here and a SIGBUS at the first write otherwise.
            os.posix_fallocate(self._file, 0, nbytes)
            mapping = mmap.mmap(self._file, nbytes)
        except OSError as error:
            self.close()
            raise TransportError(
                f'{DIRECTORY} has no room for {nbytes} bytes ({error.strerror}): enlarge it, or use transport="gloo"',
                stage="begin",
            ) from error
        self.data = torch.frombuffer(mapping, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.data.numel()

    @property
    def linked(self) -> bool:
        """Whether it can still be opened by name."""
        return self._path is not None

    def unlink(self) -> None:
        """Remove the name; whoever has it open keeps it."""
        if self._path is not None:
            path, self._path = self._path, None
            with contextlib.suppress(FileNotFoundError):  # swept by hand; the mapping lives on
                os.unlink(path)

    def close(self) -> None:
        """Unlink and close. The mapping goes with the last tensor over it."""
        self.unlink()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class ShmArena:
    """Packs into one segment as long as the whole flat buffer."""

    def __init__(self, nbytes: int) -> None:
        """Create the segment."""
        self.segment = Segment(nbytes)

    def buffer(self, start: int, stop: int) -> torch.Tensor:
        """A view of the segment."""
        return self.segment.data[start:stop]

    def close(self) -> None:
        """Drop the segment."""
        self.segment.close()


class ShmLink:
    """A receiver that reads the arena's segment. Bytes are where they belong once packed."""

    kind = "shm"

    def __init__(self, arena: ShmArena) -> None:
        """Name the segment."""
        self.address = arena.segment.name
        self.nbytes = arena.segment.nbytes

    def attach(self, deadline: Deadline) -> None:
        """Nothing to do: the receiver opens the name it is told."""

    def send(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        """Nothing to do: packing wrote into the segment."""

    def flush(self, deadline: Deadline) -> None:
        """Nothing to do: every bucket has a place of its own."""

    def close(self) -> None:
        """Nothing to do: the arena owns the segment."""


class ShmInlet:
    """Reads a sender's segment, opened once."""

    def __init__(self, name: str, nbytes: int) -> None:
        """Open it. Raises `TransportError` where it is missing, not private to this user, or short."""
        self.address = name
        self._file = -1
        if not _NAME.fullmatch(name):
            raise TransportError(f"{name!r} is not a segment of ours", stage="transfer")
        try:
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(os.path.join(DIRECTORY, name), flags)
        except OSError as error:
            reason = f"{DIRECTORY}/{name}: {error.strerror}; do both processes share {DIRECTORY}?"
            raise TransportError(reason, stage="transfer") from error
        status = os.fstat(self._file)
        private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        if not private or status.st_uid != os.geteuid() or status.st_size < nbytes:
            self.close()
            raise TransportError(
                f"{DIRECTORY}/{name} must be a file of this user's alone, {nbytes} bytes long "
                f"(uid {status.st_uid}, mode {status.st_mode & 0o777:o}, {status.st_size} bytes)",
                stage="transfer",
            )

    def receive(self, start: int, into: torch.Tensor, deadline: Deadline) -> None:
        """Read the bytes from `start` on. Raises `CorruptError` where the segment ends too early."""
        view = memoryview(into.numpy())
        done = 0
        while done < len(view):
            piece = view[done : done + _READ_BYTES]
            count = os.preadv(self._file, [piece], start + done)
            if count == 0:
                raise CorruptError(
                    f"the segment ends at byte {start + done}, {len(view) - done} short",
                    stage="transfer",
                )
            done += count

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_probe(name: str) -> str:
    """Open a probe segment and return its 32 characters: proof that two processes share /dev/shm."""
    inlet = ShmInlet(name, 32)
    try:
        content = torch.empty(32, dtype=torch.uint8)
        inlet.receive(0, content, Deadline(1))
        return bytes(content.tolist()).decode("ascii", "replace")
    finally:
        inlet.close()


def free_bytes() -> int:
    """Bytes that a new segment could take."""
    try:
        status = os.statvfs(DIRECTORY)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _create_locked() -> tuple[str, int]:
    """Create an empty segment and take the lock that says its creator lives."""
    while True:
        name = _PREFIX + secrets.token_hex(16)
        path = os.path.join(DIRECTORY, name)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(path, flags, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return name, file
        os.close(file)  # another sender's sweep came between creation and lock: take a new name


def _sweep() -> None:
    """Unlink this user's segments whose creator is gone: its lock went with it."""
    try:
        names = [name for name in os.listdir(DIRECTORY) if _NAME.fullmatch(name)]
    except OSError:
        return  # creating the segment will say what is wrong
    for name in names:
        path = os.path.join(DIRECTORY, name)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except OSError:
            pass  # its creator lives
        finally:
            os.close(file)
