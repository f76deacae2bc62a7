"""Transports: how the bytes of a bucket get from one process to another.

Two small objects per transport, alike: a link on the sender's side, an inlet on the receiver's. The control
channel tells the inlet what to open and which bucket comes next; a transport moves bytes and knows nothing else.
"""

from __future__ import annotations

from typing import Protocol

import torch

from miles_sync.channel import Deadline


class Link(Protocol):
    """The sender's end towards one receiver.

    Attributes:
        kind: "shm" or "gloo".
        address: What the receiver opens; another address means that it must open anew.
        nbytes: Length of what it opens, 0 where that means nothing.
    """

    kind: str
    address: str
    nbytes: int

    def attach(self, deadline: Deadline) -> None:
        """Meet the receiver, which opens `address` at the same time."""
        ...

    def send(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        """Start moving one packed bucket; the bucket before it has then left its buffer."""
        ...

    def flush(self, deadline: Deadline) -> None:
        """Wait until every bucket has left its buffer."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


class Inlet(Protocol):
    """The receiver's end.

    Attributes:
        address: What it opened.
    """

    address: str

    def receive(self, start: int, into: torch.Tensor, deadline: Deadline) -> None:
        """Fill `into` (uint8) with the bytes of the flat buffer from `start` on.

        Raises `CorruptError` where fewer arrive, `DeadlineError`, `PeerLostError`.
        """
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


class Arena(Protocol):
    """Where the sender packs: gives the buffer of a bucket."""

    def buffer(self, start: int, stop: int) -> torch.Tensor:
        """The uint8 buffer for bytes `start` to `stop` of the flat buffer."""
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...
