"""Transports: how the bytes of buckets get from one process to others.

Two small objects per transport, alike: an outlet on the sender's side, towards one or several receivers at once, and
an inlet on each receiver's. The control channel tells an inlet what to open and that the buckets follow; from there on
no message is needed (`shm` and `ipc` say how far the memory that they share is filled). On a device everything is
queued on streams, and only `finish` and `flush` wait.

Who waits also listens: every wait calls `hear`, which raises what the other side has to say, so that the end of a
process ends the waits for it at once and the deadline is only for silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from miles_sync.buckets import Bucket, Part
from miles_sync.channel import Deadline
from miles_sync.errors import DeadlineError

Hear = Callable[[float], None]
"""Listen for so many seconds; raises a `SyncError` where the other side has given up or is gone."""

TICK_S = 0.0001
"""How long a wait listens before it looks again."""


class Place(NamedTuple):
    """Where the parts of a bucket lie: `bytes_of` gives the uint8 view of each, always the same for one `key`."""

    key: Hashable
    bytes_of: Callable[[Part], torch.Tensor]


@dataclass
class Stream:
    """What an inlet needs to know of the buckets to come.

    Attributes:
        buckets: In the order in which they come.
        into: uint8, the whole flat buffer, where the bytes are to be kept; None where they may be overwritten once
            released.
        patience_s: How long nothing may move.
        hear: To be called while waiting.
        filled: Bytes of the flat buffer that the sender has said are there; `hear` raises it.
    """

    buckets: Sequence[Bucket]
    into: torch.Tensor | None
    patience_s: float
    hear: Hear
    filled: int = 0


class Outlet(Protocol):
    """The sender's end.

    Attributes:
        kind: The transport's name.
        address: What receivers open; another address means that they must open anew.
        says: Whether receivers must be told how far the flat buffer is filled.
    """

    kind: str
    address: str
    says: bool

    def detail(self, rank: int) -> bytes:
        """What receiver number `rank` (from 1) needs to open beside the address."""
        ...

    def attach(self, deadline: Deadline, hear: Hear) -> None:
        """Meet the receivers, which open their ends at the same time."""
        ...

    def buffer(self, bucket: Bucket, patience_s: float, hear: Hear) -> torch.Tensor:
        """The uint8 buffer (`[bucket.nbytes]`) to pack a bucket into, once it is free."""
        ...

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Start moving a bucket that was packed into its buffer."""
        ...

    def flush(self, patience_s: float, hear: Hear) -> None:
        """Wait until every bucket has left its buffer."""
        ...

    def close(self) -> None:
        """Release everything; receivers that wait fail. Safe to call twice."""
        ...


class Inlet(Protocol):
    """A receiver's end.

    Attributes:
        address: What it opened.
        device: Where the bytes that it gives are.
        lasting: Whether they stay as they are until the transaction ends, whatever becomes of the sender.
    """

    address: str
    device: torch.device
    lasting: bool

    def start(self, stream: Stream) -> None:
        """Get ready for a transaction's buckets."""
        ...

    def receive(self, bucket: Bucket) -> Place:
        """The next bucket's bytes: on a device, they are there for what is queued on the current stream from now on.

        Raises `CorruptError` where fewer arrive, `DeadlineError`, `PeerLostError`, and what `hear` raises.
        """
        ...

    def release(self, bucket: Bucket) -> None:
        """What was queued on the current stream is the last that reads this bucket."""
        ...

    def close(self) -> None:
        """Release everything; a sender that waits fails. Safe to call twice."""
        ...


def wait_until(done: Callable[[], bool], patience_s: float, hear: Hear, what: str, peer: str = "") -> None:
    """Wait for something that another process brings about. Raises `DeadlineError`, and what `hear` raises."""
    end = time.monotonic() + patience_s
    while not done():
        hear(TICK_S)
        if time.monotonic() > end:
            raise DeadlineError(f"{what}: nothing moved within {patience_s:g} s", stage="transfer", peer=peer)
