"""One transaction, seen from the sender.

    begin ──▶ transfer ──▶ verify ──▶ commit ──▶ report
      │           │           │          │
      └───────────┴───────────┘          └──▶ CommitError: who committed, who did not
                  ▼
         abort: every receiver serves what it served

`miles_sync.messages` draws the receiver's side.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from miles_sync import manifest as manifests
from miles_sync.buckets import cut, pack
from miles_sync.channel import Deadline
from miles_sync.digest import Digest
from miles_sync.errors import CommitError, CorruptError, DriftError, PeerLostError, SyncError, VersionError
from miles_sync.manifest import Manifest
from miles_sync.messages import Abort, Begin, Bucket, Commit, Prepare, Verify
from miles_sync.peer import Peer
from miles_sync.report import STAGES, Route, SyncReport
from miles_sync.routes import Routes, each
from miles_sync.sources import Source
from miles_sync.transports import Arena
from miles_sync.transports.gloo import GlooArena

_log = logging.getLogger(__name__)

_ACCOUNT_S = 0.5  # a receiver that closed its transport says why right after
_ABORT_S = 2.0  # a healthy receiver answers at once; a hung one is disconnected instead


class Transaction:
    """Brings one manifest's tensors to the peers. Used once.

    Args:
        peers: All targets, their state just asked for.
        routes: Opens links and buffers.
        source: The tensors.
        manifest: Of the source, without digest.
        deadline_s: Bound on every single wait.
        bucket_bytes: Length of a bucket.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        routes: Routes,
        source: Source,
        manifest: Manifest,
        deadline_s: float,
        bucket_bytes: int,
    ) -> None:
        """Sort the peers into those that are behind and those that have this version."""
        self._txn = secrets.token_hex(16)
        self._routes = routes
        self._source = source
        self._manifest = manifest
        self._deadline_s = deadline_s
        self._bucket_bytes = bucket_bytes
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._labels: dict[str, str | None] = {}
        self._behind = [peer for peer in peers if self._is_behind(peer)]
        self._current = [peer for peer in peers if peer not in self._behind]

    def run(self) -> SyncReport:
        """Go through all stages. Raises the `SyncError` of the first that fails, after the abort."""
        try:
            with self._timed("begin"):
                arena = self._begin()
            with self._timed("transfer"):
                digest = self._transfer(arena)
            with self._timed("verify"):
                self._verify(digest)
        except BaseException:
            self.abort()
            raise
        with self._timed("commit"):
            self._commit(digest)
        routes = [Route(p.name, p.link.kind if p.link else "", p.why) for p in self._behind]
        routes += [Route(p.name, "none", "it serves this version already") for p in self._current]
        return SyncReport(
            version=self._manifest.version,
            digest=digest,
            nbytes=self._manifest.total_bytes,
            tensors=len(self._manifest.entries),
            seconds=self._seconds,
            routes=tuple(routes),
        )

    def abort(self) -> None:
        """Have every receiver forget the transaction; one that does not answer is disconnected."""
        for peer in self._behind:
            try:
                deadline = Deadline(_ABORT_S)
                peer.unlink()  # first: a receiver stuck in a transport comes back to listen
                peer.channel.send(Abort(self._txn), deadline, "abort")
                peer.drain("Abort", deadline)
            except SyncError as error:
                _log.warning("abort: %s", error)
                peer.channel.close()
        self._routes.close()

    # -- stages --------------------------------------------------------------------------------------

    def _is_behind(self, peer: Peer) -> bool:
        theirs, ours = peer.state.version, self._manifest.version
        if theirs > ours and not peer.state.dirty:
            raise VersionError(
                f"it serves version {theirs}, {ours} is older: versions only grow",
                stage="begin",
                peer=peer.name,
            )
        return theirs != ours or peer.state.dirty

    def _begin(self) -> Arena:
        if not self._behind:
            return GlooArena(self._bucket_bytes)  # only to digest through
        each(self._offer, self._behind)
        return self._routes.open(self._behind, self._txn, self._manifest.total_bytes, self._deadline())

    def _offer(self, peer: Peer) -> None:
        self._labels[peer.name] = peer.target.published(self._deadline())
        begin = Begin(self._txn, manifests.encode(self._manifest), self._deadline_s)
        if peer.call(begin, "begin", self._deadline()).detail == "begun":
            self._order(peer, Prepare(self._txn), "begin")

    def _transfer(self, arena: Arena) -> str:
        digest = Digest()
        buckets = cut(self._manifest.total_bytes, self._bucket_bytes)
        packed = pack(self._manifest, self._source, buckets, lambda b: arena.buffer(b.start, b.stop))
        for bucket, buffer in packed:
            for peer in self._behind:
                assert peer.link is not None
                peer.raise_news("transfer")
                deadline = self._deadline()
                announcement = Bucket(self._txn, bucket.start, bucket.stop)
                peer.channel.send(announcement, deadline, "transfer")
                with _explained(peer):
                    peer.link.send(buffer, deadline)
            digest.update(bucket.start, buffer)  # while receivers copy
        for peer in self._behind:
            assert peer.link is not None
            with _explained(peer):
                peer.link.flush(self._deadline())
        return digest.hexdigest(self._manifest.layout_id())

    def _verify(self, digest: str) -> None:
        for peer in self._current:
            if peer.state.digest != digest:
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
            peer.target.publish(label, Deadline(min(self._deadline_s, _ABORT_S)))
        except SyncError as error:
            _log.warning("the published version could not be put back: %s", error)

    # -- small steps ---------------------------------------------------------------------------------

    def _order(self, peer: Peer, order: Prepare | Commit, stage: str) -> str:
        deadline = self._deadline()
        peer.target.order(peer.channel, order, self._manifest.version, deadline)
        return peer.answer(type(order).__name__, stage, deadline).detail

    def _deadline(self) -> Deadline:
        return Deadline(self._deadline_s)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = time.perf_counter() - start


@contextmanager
def _explained(peer: Peer) -> Iterator[None]:
    """Around the use of a link: where it fails, prefer the receiver's own account of why."""
    try:
        yield
    except SyncError as error:
        if peer.channel.poll(_ACCOUNT_S):
            try:
                peer.raise_news("transfer")
            except PeerLostError:
                raise error from None
        raise
