"""Targets: how a sender reaches a receiver, and who carries out its orders there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from miles_sync.channel import Channel, Deadline, dial
from miles_sync.errors import SyncError
from miles_sync.messages import Commit, Prepare


class Target(Protocol):
    """One receiver, seen from the sender.

    Attributes:
        name: For reports and errors.
    """

    name: str

    def connect(self, token: str, deadline: Deadline) -> Channel:
        """Open an authenticated channel. Raises a `SyncError`."""
        ...

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        """Have the owner of the weights carry out an order; the answer comes over the channel."""
        ...

    def published(self, deadline: Deadline) -> str | None:
        """The version that the target tells its own clients, or None where it tells none."""
        ...

    def publish(self, version: str, deadline: Deadline) -> None:
        """Correct what `published` says. Called only where it differs from what was committed."""
        ...


class ReceiverTarget:
    """A receiver that another process (or thread) serves with `miles_sync.serve`."""

    def __init__(self, host: str, port: int, *, name: str = "") -> None:
        """Name its address; nothing is opened yet."""
        self.name = name or f"{host}:{port}"
        self._host, self._port = host, port

    def connect(self, token: str, deadline: Deadline) -> Channel:
        """Connect and authenticate. Raises `DeadlineError`, `PeerLostError`, `AuthError`."""
        return dial(self._host, self._port, token, deadline, self.name)

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        """Send it: the receiver's own thread carries it out."""
        channel.send(order, deadline, "commit" if isinstance(order, Commit) else "begin")

    def published(self, deadline: Deadline) -> str | None:
        """A plain receiver publishes nothing."""
        return None

    def publish(self, version: str, deadline: Deadline) -> None:
        """Nothing to correct."""


class Once:
    """Sees that the ranks of an engine, which commit the same transaction, send it one request."""

    def __init__(self) -> None:
        """Nothing was done yet."""
        self._lock = threading.Lock()
        self._txn = ""
        self._error: SyncError | None = None

    def once(self, txn: str, act: Callable[[], None]) -> None:
        """Act for the first caller of a transaction; the others wait and share what came of it."""
        with self._lock:
            if txn != self._txn:
                self._txn, self._error = txn, None
                try:
                    act()
                except SyncError as error:
                    self._error = error
            if self._error is not None:
                raise self._error
