"""Which transport leads to which receiver, and the buffers behind them: opened once, reused for each push."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from miles_sync.channel import Deadline
from miles_sync.messages import Attach
from miles_sync.peer import Peer
from miles_sync.transports import Arena
from miles_sync.transports.gloo import GlooArena, GlooLink
from miles_sync.transports.shm import ShmArena, ShmLink, free_bytes

Transport = Literal["auto", "shm", "gloo"]
TRANSPORTS = ("auto", "shm", "gloo")


class Routes:
    """Opens links and the arena that feeds them.

    Args:
        transport: One for all, or "auto": shared memory where it can be shared and has room, else gloo.
        bucket_bytes: Length of a bucket.
    """

    def __init__(self, transport: Transport, bucket_bytes: int) -> None:
        """Open nothing yet."""
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._shm: ShmArena | None = None
        self._gloo: GlooArena | None = None

    def open(self, peers: Sequence[Peer], txn: str, nbytes: int, deadline: Deadline) -> Arena:
        """See that every peer has a link for a flat buffer of `nbytes`.

        Returns:
            The arena to pack into. Raises `TransportError` where the transport asked for cannot be had.
        """
        shared = [peer for peer in peers if self._choose(peer, nbytes)]
        if shared:
            self._share(shared, nbytes)
        if self._gloo is None and not shared:
            self._gloo = GlooArena(self._bucket_bytes)
        each(lambda peer: self._attach(peer, peer in shared, txn, deadline), peers)
        if self._shm is not None:
            self._shm.segment.unlink()  # everyone has it open: from here on a kill leaves nothing behind
        arena = self._shm if shared else self._gloo
        assert arena is not None
        return arena

    def close(self) -> None:
        """Drop the buffers. The links are the peers' to close."""
        for arena in (self._shm, self._gloo):
            if arena is not None:
                arena.close()
        self._shm = self._gloo = None

    def _choose(self, peer: Peer, nbytes: int) -> bool:
        """Whether a peer is reached through shared memory; leaves the reason with it."""
        if self._transport != "auto":
            peer.why = "asked for"
            return self._transport == "shm"
        held = 0 if self._shm is None else self._shm.segment.nbytes
        if peer.unshared:
            peer.why = f"no shared memory: {peer.unshared}"
        elif free_bytes() + held < nbytes:
            peer.why = f"/dev/shm has {free_bytes()} bytes free, {nbytes} are needed"
        else:
            peer.why = "same machine: a probe segment was read back"
        return peer.why.startswith("same")

    def _share(self, peers: Sequence[Peer], nbytes: int) -> None:
        """Keep the segment if it is long enough and everyone has it or still can open it; else make another."""
        segment = None if self._shm is None else self._shm.segment
        if segment is not None and segment.nbytes >= nbytes:
            opened = all(peer.link is not None and peer.link.address == segment.name for peer in peers)
            if opened or segment.linked:
                return
        if self._shm is not None:
            self._shm.close()
            self._shm = None
        self._shm = ShmArena(nbytes)

    def _attach(self, peer: Peer, shared: bool, txn: str, deadline: Deadline) -> None:
        if shared:
            assert self._shm is not None
            if peer.link is not None and peer.link.address == self._shm.segment.name:
                return
            peer.unlink()
            peer.link = ShmLink(self._shm)
        elif peer.link is None or peer.link.kind != "gloo":
            peer.unlink()
            peer.link = GlooLink(peer.channel.local_host, peer.name)
        else:
            return
        link = peer.link
        message = Attach(txn, link.kind, link.address, link.nbytes)
        peer.channel.send(message, deadline, "transfer")
        link.attach(deadline)
        peer.answer("Attach", "transfer", deadline)


def each[T, R](act: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Act on all items at once, wait for all, then raise the first error with the others as notes."""
    if len(items) == 1:
        return [act(items[0])]
    if not items:
        return []
    with ThreadPoolExecutor(len(items), thread_name_prefix="miles-sync") as pool:
        futures = [pool.submit(act, item) for item in items]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"also: {other}")
        raise errors[0]
    return [future.result() for future in futures]
