"""The sender: pushes versions of a model's weights to any number of receivers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence

import torch

from miles_sync import manifest as manifests
from miles_sync.buckets import Packers, check_length
from miles_sync.channel import Deadline, check_token
from miles_sync.errors import DriftError, ManifestError, SyncError
from miles_sync.manifest import Manifest, TensorMeta
from miles_sync.messages import Mode
from miles_sync.peer import Peer
from miles_sync.report import SyncReport, TargetState
from miles_sync.routes import TRANSPORTS, Load, Routes, Transport, each
from miles_sync.sources import Held, Source, as_source
from miles_sync.targets import Target
from miles_sync.transaction import Terms, Transaction

_log = logging.getLogger(__name__)

Weights = torch.nn.Module | Mapping[str, torch.Tensor] | Source | Iterable[tuple[str, torch.Tensor]]


class WeightSync:
    """Pushes versions of a model's weights to receivers.

    Args:
        targets: Receivers: `ReceiverTarget`, `miles_sync.sglang.SGLangTarget`, or your own `Target`.
        token: The secret shared with every receiver, at least 16 characters.
        transport: "ipc", "nccl", "shm", "gloo", or "auto": per receiver, the best that a probe finds (see
            `miles_sync.routes`); the report says why.
        mode: "staged": receivers keep the new weights beside the old until commit. "in_place": they write them over
            the old as they arrive, in no extra memory; one whose transfer was interrupted is dirty, refuses to serve,
            and is healed by pushing the same version again or a newer one.
        digest: Whether every byte is digested on both sides and compared. Without, nothing proves what arrived.
        deadline_s: Bound, in seconds, on every single wait: for a connection, for an answer, for a bucket to
            move. Also the silence after which a receiver gives a transaction up.
        bucket_bytes: Length of a bucket, a multiple of 2 MiB; None for 64 MiB through host memory and 192 MiB
            between devices. Two are held on each side of gloo and NCCL.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        token: str,
        transport: Transport = "auto",
        mode: Mode = "staged",
        digest: bool = True,
        deadline_s: float = 120.0,
        bucket_bytes: int | None = None,
    ) -> None:
        """Keep the settings; nothing is opened before `connect`, `push` or `status`."""
        names = [target.name for target in targets]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"targets={names} must be at least one, with different names")
        if transport not in TRANSPORTS:
            raise ValueError(f"transport={transport!r} must be one of {', '.join(TRANSPORTS)}")
        if deadline_s <= 0:
            raise ValueError(f"deadline_s={deadline_s} must be above 0")
        if mode not in ("staged", "in_place"):
            raise ValueError(f'mode={mode!r} must be "staged" or "in_place"')
        if bucket_bytes is not None:
            check_length(bucket_bytes)
        self._targets = tuple(targets)
        self._token = check_token(token)
        self._deadline_s = deadline_s
        self._terms = Terms(mode, digest, deadline_s)
        self._packers = Packers()
        self._known: tuple[Sequence[TensorMeta], Manifest] | None = None
        self._routes = Routes(transport, bucket_bytes)
        self._peers: dict[str, Peer] = {}
        self._lock = threading.Lock()

    def connect(self, weights: Weights | None = None) -> None:
        """Connect to every target that is not connected. `push` and `status` do so by themselves.

        Args:
            weights: What will be pushed: then all that its first push would have to make is made now (the receivers'
                copy plans, transports, buffers, kernels), and no weight changes. A one-shot iterator is used up.

        Raises `AuthError`, `BusyError`, `DeadlineError`, `MismatchError`, `PeerLostError`.
        """
        if weights is None:
            with self._lock:
                self._connect_missing()
            return
        source = as_source(weights)
        with self._lock:
            peers = self._current_peers()
            version = max(peer.state.version for peer in peers) + 1
            self._transaction(peers, source, self._laid_out(source.metadata(), version)).rehearse()

    def push(self, weights: Weights, version: int) -> SyncReport:
        """Make `weights` the version that every target serves.

        Args:
            weights: A module, a mapping, (name, tensor) pairs, or a `Source` that makes them on the fly. Read
                once; they must not change before this returns.
            version: Higher than what the targets serve. A target that serves this version already is left
                alone if the digest is equal, and refuses if not.

        Returns:
            What happened. Raises a `SyncError` of the stage that failed; before commit, every target then
            still serves what it served, and a later push starts afresh.
        """
        source = as_source(weights)
        with self._lock:
            manifest = self._laid_out(source.metadata(), version)
            return self._transaction(self._current_peers(), source, manifest).run()

    def status(self) -> tuple[TargetState, ...]:
        """Ask every target what it serves; each reads its live weights again to say whether they are intact."""
        with self._lock:
            return tuple(each(self._status, self._current_peers()))

    def check(self, version: int, digest: str) -> None:
        """Raise `DriftError` unless every target serves this version and digest, intact, and says so."""
        for state in self.status():
            wrong = {
                "version": (state.version, version),
                "digest": (state.digest, digest),
                "intact": (state.intact, True),
                "dirty": (state.dirty, False),
                "published version": (state.published, state.published and str(version)),
            }
            for what, (found, expected) in wrong.items():
                if found != expected:
                    reason = f"its {what} is {found}, expected {expected}"
                    raise DriftError(reason, stage="status", peer=state.target)

    def close(self) -> None:
        """End all connections and release buffers; targets go on serving what they have."""
        with self._lock:
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()
            self._routes.close()

    def __enter__(self) -> WeightSync:
        """Itself, connected."""
        self.connect()
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def _transaction(self, peers: Sequence[Peer], source: Source, manifest: Manifest) -> Transaction:
        held = source.held() if isinstance(source, Held) else None
        devices = {tensor.device for tensor in held or ()}
        device = devices.pop() if len(devices) == 1 else getattr(source, "device", torch.device("cpu"))
        load = Load(source, held, device, manifest.total_bytes)
        return Transaction(peers, self._routes, load, manifest, self._packers, self._terms)

    def _laid_out(self, metas: Sequence[TensorMeta], version: int) -> Manifest:
        """The manifest; checked once for a model, not for each of its versions."""
        if self._known is None or (self._known[0] is not metas and list(self._known[0]) != list(metas)):
            self._known = metas, manifests.lay_out(metas, version)
        if version < 0:
            raise ManifestError(f"version={version} must be 0 or more", stage="begin")
        return self._known[1].with_version(version)

    def _current_peers(self) -> list[Peer]:
        """Every target, connected and asked for its state: one that went away meanwhile is connected anew."""
        for name, peer in list(self._peers.items()):
            try:
                peer.ask(self._deadline())
            except SyncError as error:
                _log.info("connecting to %s again: %s", name, error)
                peer.close()
                del self._peers[name]
        self._connect_missing()
        return [self._peers[target.name] for target in self._targets]

    def _connect_missing(self) -> None:
        each(self._connect, [t for t in self._targets if t.name not in self._peers])

    def _connect(self, target: Target) -> None:
        deadline = self._deadline()
        channel = target.connect(self._token, deadline)
        try:
            self._peers[target.name] = Peer(target, channel, deadline)
        except BaseException:
            channel.close()
            raise

    def _status(self, peer: Peer) -> TargetState:
        deadline = self._deadline()
        state = peer.ask(deadline, recompute=True)
        return TargetState(
            target=peer.name,
            version=None if state.version < 0 else state.version,
            digest=state.digest,
            intact=state.intact,
            dirty=state.dirty,
            published=peer.target.published(deadline),
        )

    def _deadline(self) -> Deadline:
        return Deadline(self._deadline_s)
