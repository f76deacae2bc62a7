"""Which transport leads to which receiver, and what is open: opened once, reused for each push.

one GPU for both                          ipc     receivers read the trainer's tensors where they lie
GPUs of one host or of several, NCCL      nccl    one broadcast for all of them
host memory, one machine                  shm     receivers read the segment where it lies
anything else                             gloo    TCP, through host memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from miles_sync.buckets import DEVICE_BUCKET_BYTES, HOST_BUCKET_BYTES
from miles_sync.channel import Deadline
from miles_sync.errors import SyncError
from miles_sync.messages import Attach
from miles_sync.peer import Peer
from miles_sync.shared import SharedArena
from miles_sync.sources import Source
from miles_sync.transports import Hear, Outlet
from miles_sync.transports import ipc as ipc_transport
from miles_sync.transports import nccl as nccl_transport
from miles_sync.transports.gloo import GlooOutlet
from miles_sync.transports.ipc import IpcOutlet
from miles_sync.transports.nccl import NcclOutlet
from miles_sync.transports.shm import Segment, ShmOutlet, available_bytes

Transport = Literal["auto", "shm", "gloo", "nccl", "ipc"]
TRANSPORTS = ("auto", "shm", "gloo", "nccl", "ipc")


@dataclass(frozen=True)
class Load:
    """What is to be sent, as far as the choice of a transport depends on it.

    Attributes:
        source: The tensors.
        held: They themselves, where they stay where they are during a push; else None.
        device: Where they are.
        nbytes: Of the flat buffer.
    """

    source: Source
    held: Sequence[torch.Tensor] | None
    device: torch.device
    nbytes: int


class Routes:
    """Opens outlets.

    Args:
        transport: One for all, or "auto".
        bucket_bytes: Length of a bucket, or None for what suits the transport.
    """

    def __init__(self, transport: Transport, bucket_bytes: int | None) -> None:
        """Open nothing yet."""
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._open: dict[str, tuple[Outlet, list[Peer]]] = {}
        self._segment: Segment | None = None

    def choose(self, peers: Sequence[Peer], load: Load) -> dict[str, list[Peer]]:
        """Peers by transport; the reason is left with each peer."""
        chosen: dict[str, list[Peer]] = {}
        for peer in peers:
            kind, peer.why = self._choose(peer, peers, load)
            peer.kind = kind
            chosen.setdefault(kind, []).append(peer)
        return chosen

    def bucket_bytes(self, kinds: Sequence[str]) -> int:
        """Length of a bucket."""
        if self._bucket_bytes is not None:
            return self._bucket_bytes
        return DEVICE_BUCKET_BYTES if set(kinds) <= {"nccl", "ipc"} else HOST_BUCKET_BYTES

    def open(
        self, chosen: dict[str, list[Peer]], load: Load, txn: str, bucket_bytes: int, deadline: Deadline, hear: Hear
    ) -> list[Outlet]:
        """See that every peer is attached to its outlet. Raises `TransportError` where one cannot be had."""
        outlets = []
        for kind in [kind for kind in self._open if kind not in chosen]:
            self._close(kind)
        for kind, peers in chosen.items():
            outlet = self._outlet(kind, peers, load, bucket_bytes)
            missing = [peer for peer in peers if peer.attached != outlet.address]
            for peer in missing:
                peer.attached = ""
                detail = outlet.detail(peers.index(peer) + 1)
                peer.channel.send(Attach(txn, kind, outlet.address, detail), deadline, "transfer")
            if missing:
                outlet.attach(deadline, hear)
            for peer in missing:
                peer.answer("Attach", "transfer", deadline)
                peer.attached = outlet.address
            outlets.append(outlet)
        return outlets

    def close(self) -> None:
        """Close all outlets and drop their buffers."""
        for kind in list(self._open):
            self._close(kind)
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _close(self, kind: str) -> None:
        outlet, peers = self._open.pop(kind)
        outlet.close()
        for peer in peers:
            peer.attached = ""

    def _outlet(self, kind: str, peers: list[Peer], load: Load, bucket_bytes: int) -> Outlet:
        """The open outlet where it still serves, else a new one."""
        known = self._open.get(kind)
        if known is not None and self._serves(known, peers, load):
            return known[0]
        if known is not None:
            self._close(kind)
        match kind:
            case "shm":
                outlet: Outlet = ShmOutlet(self._segment_for(load))
            case "gloo":
                outlet = GlooOutlet(peers[0].channel.local_host, len(peers), bucket_bytes)
            case "nccl":
                outlet = NcclOutlet(_device_of(load, kind), len(peers), bucket_bytes)
            case _:
                outlet = IpcOutlet(_held(load))
        self._open[kind] = outlet, peers
        return outlet

    def _serves(self, known: tuple[Outlet, list[Peer]], peers: list[Peer], load: Load) -> bool:
        outlet, attached = known
        if isinstance(outlet, ShmOutlet):
            if isinstance(load.source, SharedArena):
                return outlet.segment is load.source.segment
            return outlet.segment is self._segment and outlet.segment.data.numel() >= load.nbytes
        if isinstance(outlet, IpcOutlet):
            return load.held is not None and outlet.holds(load.held)
        # A group is made of these very peers, and one that left has broken it.
        return attached == peers and all(peer.attached == outlet.address for peer in peers)

    def _segment_for(self, load: Load) -> Segment:
        if isinstance(load.source, SharedArena):
            return load.source.segment
        if self._segment is None or self._segment.data.numel() < load.nbytes:
            if self._segment is not None:
                self._segment.close()
            self._segment = Segment(load.nbytes)
        return self._segment

    def _choose(self, peer: Peer, peers: Sequence[Peer], load: Load) -> tuple[str, str]:
        """The transport for a peer, and why."""
        if self._transport != "auto":
            return self._transport, "asked for"
        device = self._device_route(peer, peers, load)
        if device is not None:
            return device
        held = 0 if self._segment is None else self._segment.data.numel()
        if peer.unshared:
            return "gloo", f"no shared memory: {peer.unshared}"
        if available_bytes() + held < load.nbytes:
            return "gloo", f"{available_bytes()} bytes of memory are free, {load.nbytes} are needed to share"
        return "shm", "same machine: a probe segment was read back"

    def _device_route(self, peer: Peer, peers: Sequence[Peer], load: Load) -> tuple[str, str] | None:
        if load.device.type != "cuda" or peer.state.device == "cpu":
            return None
        ours = ipc_transport.uuid_of(load.device)
        if peer.state.device == ours:
            if peer.unshared or load.held is None:
                return None  # NCCL does not connect a GPU with itself
            known = self._open.get("ipc")
            if known is None or not self._serves(known, known[1], load):
                try:
                    ipc_transport.exportable(load.held)
                except SyncError:
                    return None
            return "ipc", "both on one GPU: its memory is mapped"
        against = nccl_transport.reason_against() or peer.state.nccl
        if against or len({other.state.device for other in peers}) < len(peers):
            return None
        return "nccl", "both on GPUs, not the same one"


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


def _device_of(load: Load, kind: str) -> torch.device:
    if load.device.type != "cuda":
        raise SyncError(f'transport="{kind}" needs weights on a GPU, these are on {load.device}', stage="begin")
    return load.device


def _held(load: Load) -> Sequence[torch.Tensor]:
    if load.held is None:
        raise SyncError(
            'transport="ipc" needs tensors that stay where they are: pass a module or a mapping', stage="begin"
        )
    return load.held
