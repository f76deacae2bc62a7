"""gloo: the sender's buckets travel over TCP through a process group of two, made for this pair alone.

The group is `ProcessGroupGloo` over a store that the sender serves on the address under which the receiver
reached it; the default process group is neither needed nor touched. Store keys carry an unguessable prefix that
travels on the control channel. gloo itself neither authenticates nor encrypts: off loopback, use it on a
network you trust.
"""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import (
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] - documented there, not marked so
    Work,
)
from torch.distributed.distributed_c10d import PrefixStore, Store

from miles_sync.channel import Deadline, listen
from miles_sync.errors import DeadlineError, PeerLostError, SyncError, TransportError

_SENDER, _RECEIVER = 0, 1


class GlooArena:
    """Packs into two buffers in turn, each as long as a bucket."""

    def __init__(self, bucket_bytes: int) -> None:
        """Allocate the buffers."""
        self._buffers = [torch.empty(bucket_bytes, dtype=torch.uint8) for _ in range(2)]

    def buffer(self, start: int, stop: int) -> torch.Tensor:
        """The buffer that was not given last time."""
        self._buffers.reverse()
        return self._buffers[0][: stop - start]

    def close(self) -> None:
        """Drop the buffers."""
        self._buffers.clear()


class GlooLink:
    """The sender's end: serves the store, then sends."""

    kind = "gloo"
    nbytes = 0

    def __init__(self, host: str, peer: str) -> None:
        """Serve a store on `host`, an address of this machine that the receiver can reach."""
        self._peer = peer
        self._host = host
        self._group: Any = None
        self._in_flight: Work | None = None
        listener = listen(host)
        port = listener.getsockname()[1]
        # Left to itself the store listens on every interface; given a socket it uses that one, and owns it.
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        self._prefix = secrets.token_hex(16)
        self.address = f"{host} {port} {self._prefix}"

    def attach(self, deadline: Deadline) -> None:
        """Build the group; the receiver builds its half at the same time."""
        self._group = _group(self._store, self._prefix, _SENDER, self._host, deadline, self._peer)

    def send(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        """Start sending a bucket, once the one before has left."""
        if self._group is None:
            raise TransportError("not attached", stage="transfer", peer=self._peer)
        self.flush(deadline)
        try:
            self._in_flight = self._group.send([buffer], _RECEIVER, 0)
        except RuntimeError as error:
            raise _named(error, deadline, self._peer) from error

    def flush(self, deadline: Deadline) -> None:
        """Wait until nothing is in flight."""
        work, self._in_flight = self._in_flight, None
        if work is not None:
            _wait(work, deadline, self._peer)

    def close(self) -> None:
        """Drop the group; the receiver's pending call fails at once."""
        self._in_flight = None
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class GlooInlet:
    """The receiver's end."""

    def __init__(self, address: str, local_host: str, deadline: Deadline) -> None:
        """Join the sender's group, talking from `local_host`. Raises `TransportError`."""
        self.address = address
        self._peer = "the sender"
        try:
            host, port, prefix = address.split(" ")
            store = TCPStore(
                host,
                int(port),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(deadline.left(), 0.001)),
            )
        except (ValueError, RuntimeError) as error:
            raise TransportError(f"gloo store {address!r}: {error}", stage="transfer") from error
        self._group: Any = _group(store, prefix, _RECEIVER, local_host, deadline, self._peer)

    def receive(self, start: int, into: torch.Tensor, deadline: Deadline) -> None:
        """Receive the next bucket into `into`. Buckets come in the order in which they are announced.

        A message longer than `into` would end this process (gloo's reading thread throws, and nothing catches
        it): both sides take the length from the same announcement, and a group that saw an error is never used
        again.
        """
        if self._group is None:
            raise TransportError("closed", stage="transfer", peer=self._peer)
        try:
            _wait(self._group.recv([into], _SENDER, 0), deadline, self._peer)
        except RuntimeError as error:
            if isinstance(error, SyncError):
                raise
            raise _named(error, deadline, self._peer) from error

    def close(self) -> None:
        """Drop the group; the sender's pending call fails at once."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def _group(store: Store, prefix: str, rank: int, host: str, deadline: Deadline, peer: str) -> Any:
    gloo: Any = ProcessGroupGloo  # its stub lacks options, send and recv
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=max(deadline.left(), 0.001))
    try:
        return gloo(PrefixStore(prefix, store), rank, 2, options)
    except RuntimeError as error:
        raise TransportError(f"gloo: {error}", stage="transfer", peer=peer) from error


def _wait(work: Work, deadline: Deadline, peer: str) -> None:
    try:
        work.wait(timedelta(seconds=max(deadline.left(), 0.001)))
    except RuntimeError as error:
        raise _named(error, deadline, peer) from error


def _named(error: RuntimeError, deadline: Deadline, peer: str) -> SyncError:
    text = str(error).splitlines()[0]
    if deadline.left() == 0 or "timed out" in text.lower():
        reason = f"gloo: nothing moved within {deadline.seconds:g} s ({text})"
        return DeadlineError(reason, stage="transfer", peer=peer)
    return PeerLostError(f"gloo: {text}", stage="transfer", peer=peer)
