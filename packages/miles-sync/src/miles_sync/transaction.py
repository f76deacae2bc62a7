"""One transaction, seen from the sender.

    begin ──▶ transfer ──▶ verify ──▶ commit ──▶ report
      │           │           │          │
      └───────────┴───────────┘          └──▶ CommitError: who committed, who did not
                  ▼
         abort: staged, every receiver serves what it served; in place, one that had begun to write is dirty

`miles_sync.messages` draws the receiver's side.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from miles_sync import manifest as manifests
from miles_sync.buckets import Bucket, Packers
from miles_sync.channel import Deadline
from miles_sync.digest import Digest, warm
from miles_sync.errors import CommitError, CorruptError, DriftError, PeerLostError, SyncError, VersionError
from miles_sync.manifest import Manifest
from miles_sync.messages import Abort, Begin, Commit, Filled, Mode, Prepare, Stream, Verify
from miles_sync.peer import Peer
from miles_sync.report import STAGES, Route, SyncReport
from miles_sync.routes import Load, Routes, each
from miles_sync.transports import Outlet

_log = logging.getLogger(__name__)

_ACCOUNT_S = 0.5  # a receiver that closed its transport says why right after
_ABORT_S = 2.0  # a healthy receiver answers at once; a hung one is disconnected instead


@dataclass(frozen=True)
class Terms:
    """How a transaction is carried out: mode, whether bytes are digested, and the bound on every single wait."""

    mode: Mode
    digest: bool
    deadline_s: float


class Transaction:
    """Brings one manifest's tensors to the peers. Used once.

    Args:
        peers: All targets, their state just asked for.
        routes: Opens outlets.
        load: The tensors.
        manifest: Of the source.
        packers: What is known from earlier pushes.
        terms: How.
    """

    def __init__(
        self, peers: Sequence[Peer], routes: Routes, load: Load, manifest: Manifest, packers: Packers, terms: Terms
    ) -> None:
        """Sort the peers into those that are behind and those that have this version."""
        self._txn = secrets.token_hex(16)
        self._routes = routes
        self._load = load
        self._manifest = manifest
        self._packers = packers
        self._terms = terms
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._labels: dict[str, str | None] = {}
        self._behind = [peer for peer in peers if self._is_behind(peer)]
        self._current = [peer for peer in peers if peer not in self._behind]

    def run(self) -> SyncReport:
        """Go through all stages. Raises the `SyncError` of the first that fails, after the abort."""
        try:
            with self._timed("begin"):
                outlets = self._begin()
            with self._timed("transfer"), self._explained():
                digest = self._transfer(outlets)
            with self._timed("verify"), self._explained():
                self._verify(digest)
        except BaseException:
            self.abort()
            raise
        with self._timed("commit"):
            self._commit(digest)
        routes = [Route(peer.name, peer.kind, peer.why) for peer in self._behind]
        routes += [Route(peer.name, "none", "it serves this version already") for peer in self._current]
        return SyncReport(
            version=self._manifest.version,
            digest=digest,
            mode=self._terms.mode,
            nbytes=self._manifest.total_bytes,
            tensors=len(self._manifest.entries),
            seconds=self._seconds,
            routes=tuple(routes),
        )

    def rehearse(self) -> None:
        """Begin, and go no further: what the next transaction needs stays open. Raises as `run`, after the abort."""
        try:
            warm(self._load.device)
            self._begin()
            for peer in self._behind:
                peer.call(Abort(self._txn), "begin", self._deadline())
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Have every receiver forget the transaction; one that does not answer is disconnected."""
        self._routes.close()  # first: a receiver stuck in a transport comes back to listen
        for peer in self._behind:
            try:
                deadline = Deadline(_ABORT_S)
                peer.channel.send(Abort(self._txn), deadline, "abort")
                peer.drain("Abort", deadline)
            except SyncError as error:
                _log.warning("abort: %s", error)
                peer.channel.close()

    # -- stages --------------------------------------------------------------------------------------

    def _is_behind(self, peer: Peer) -> bool:
        theirs, ours = peer.state.version, self._manifest.version
        if theirs > ours:
            raise VersionError(
                f"it serves version {theirs}, {ours} is older: versions only grow",
                stage="begin",
                peer=peer.name,
            )
        return theirs != ours or peer.state.dirty

    def _begin(self) -> list[Outlet]:
        chosen = self._routes.choose(self._behind, self._load)
        length = self._routes.bucket_bytes(list(chosen))
        self._packer = self._packers.of(self._manifest, length)
        each(lambda peer: self._offer(peer, length), self._behind)
        return self._routes.open(chosen, self._load, self._txn, length, self._deadline(), self._hear)

    def _offer(self, peer: Peer, bucket_bytes: int) -> None:
        terms, layout = self._terms, self._manifest.layout_id()
        self._labels[peer.name] = peer.target.published(self._deadline())
        known = peer.state.layout == layout
        manifest = b"" if known else manifests.encode(self._manifest)
        begin = Begin(
            self._txn,
            self._manifest.version,
            layout,
            manifest,
            terms.mode,
            bucket_bytes,
            terms.digest,
            terms.deadline_s,
        )
        if peer.call(begin, "begin", self._deadline()).detail == "begun":
            self._order(peer, Prepare(self._txn), "begin")

    def _transfer(self, outlets: list[Outlet]) -> str:
        """Bring all bytes on their way, digesting them meanwhile."""
        if self._load.device.type == "cuda":
            torch.cuda.current_stream(self._load.device).synchronize()  # the weights are there
        for peer in self._behind:
            peer.channel.send(Stream(self._txn), self._deadline(), "transfer")
        digest = Digest()
        packing = [outlet for outlet in outlets if outlet.kind != "ipc"]
        if packing:
            self._pack(packing, digest)
        elif self._terms.digest:
            self._digest_in_place(digest)
        return digest.hexdigest(self._manifest.layout_id()) if self._terms.digest else ""

    def _pack(self, outlets: list[Outlet], digest: Digest) -> None:
        patience, first = self._terms.deadline_s, outlets[0]

        def buffer_for(bucket: Bucket) -> torch.Tensor:
            return first.buffer(bucket, patience, self._hear)

        held = self._load.held
        packed = (
            self._packer.pack(self._load.source, buffer_for)
            if held is None
            else self._packer.pack_held(held, buffer_for)
        )
        for bucket, buffer in packed:
            for outlet in outlets:
                mine = buffer
                if outlet is not first:
                    mine = outlet.buffer(bucket, patience, self._hear)
                    mine.copy_(buffer)
                outlet.send(bucket, mine)
                if outlet.says:
                    self._say(outlet, Filled(self._txn, bucket.stop))
            if self._terms.digest:
                digest.update(self._packer.runs(bucket, buffer))  # while it travels
            self._hear(0)
        for outlet in outlets:
            outlet.flush(patience, self._hear)

    def _say(self, outlet: Outlet, message: Filled) -> None:
        for peer in self._behind:
            if peer.kind == outlet.kind:
                peer.channel.send(message, self._deadline(), "transfer")

    def _digest_in_place(self, digest: Digest) -> None:
        """Nothing is packed: read the tensors where they lie, while receivers do the same."""
        held = self._load.held
        assert held is not None
        digest.update(self._packers.runs(self._manifest, held))

    def _verify(self, digest: str) -> None:
        for peer in self._current:
            if self._terms.digest and peer.state.digest not in ("", digest):
                raise VersionError(
                    f"it serves version {peer.state.version} with digest {peer.state.digest}, this push has "
                    f"{digest}: other weights need a new version",
                    stage="verify",
                    peer=peer.name,
                )
        # Ask all before waiting for any: they digest at the same time.
        for peer in self._behind:
            peer.channel.send(Verify(self._txn, digest), self._deadline(), "verify")
        for peer in self._behind:
            echoed = peer.answer("Verify", "verify", self._deadline()).detail
            if echoed != digest:
                reason = f"it echoes digest {echoed}, {digest} was sent"
                raise CorruptError(reason, stage="verify", peer=peer.name)

    def _commit(self, digest: str) -> None:
        failures: dict[str, SyncError] = {}

        def commit(peer: Peer) -> None:
            try:
                self._commit_one(peer, digest)
            except SyncError as error:
                failures[peer.name] = error
                self._repair(peer)

        each(commit, self._behind)
        if not failures:
            return
        self.abort()
        if len(failures) == len(self._behind) == 1:
            raise next(iter(failures.values()))
        done = [peer.name for peer in self._behind if peer.name not in failures]
        raise CommitError(
            f"version {self._manifest.version} is committed on {done}, not on {list(failures)}: push it again. "
            + "; ".join(str(error) for error in failures.values()),
            stage="commit",
        )

    def _commit_one(self, peer: Peer, digest: str) -> None:
        version = self._manifest.version
        echoed = self._order(peer, Commit(self._txn), "commit")
        if echoed != digest:
            reason = f"it echoes digest {echoed}, {digest} was verified"
            raise DriftError(reason, stage="commit", peer=peer.name)
        published = peer.target.published(self._deadline())
        if published not in (None, str(version)):
            reason = f"it publishes version {published!r} after committing {version}"
            raise DriftError(reason, stage="commit", peer=peer.name)

    def _repair(self, peer: Peer) -> None:
        """An engine publishes the new version whatever its loader did: put back what is true."""
        label = self._labels.get(peer.name)
        if label is None:
            return
        try:
            peer.target.publish(label, Deadline(min(self._terms.deadline_s, _ABORT_S)))
        except SyncError as error:
            _log.warning("the published version could not be put back: %s", error)

    # -- small steps ---------------------------------------------------------------------------------

    def _order(self, peer: Peer, order: Prepare | Commit, stage: str) -> str:
        deadline = self._deadline()
        peer.target.order(peer.channel, order, self._manifest.version, deadline)
        return peer.answer(type(order).__name__, stage, deadline).detail

    def _hear(self, seconds: float) -> None:
        """Listen to all receivers; what they say in the middle of a transfer ends it."""
        for index, peer in enumerate(self._behind):
            peer.listen(0 if index else seconds, "transfer")

    def _deadline(self) -> Deadline:
        return Deadline(self._terms.deadline_s)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = time.perf_counter() - start

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A transport fails because a receiver failed: prefer the receiver's own words."""
        try:
            yield
        except SyncError as error:
            until = Deadline(_ACCOUNT_S)
            while not error.peer and until.left():
                for peer in self._behind:
                    try:
                        peer.listen(0.01, "transfer")
                    except PeerLostError as lost:
                        if isinstance(error, PeerLostError):
                            raise lost from error
            raise
