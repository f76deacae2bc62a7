"""The receiver's side of the protocol: the state machine of `miles_sync.messages`, and the loop that feeds it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import torch

from miles_sync import manifest as manifests
from miles_sync.channel import Channel, Deadline
from miles_sync.digest import CHUNK_BYTES, Digest
from miles_sync.errors import (
    BusyError,
    CommitError,
    CorruptError,
    ManifestError,
    ProtocolError,
    SyncError,
    TransportError,
    VersionError,
)
from miles_sync.manifest import Manifest
from miles_sync.messages import (
    Abort,
    Ask,
    Attach,
    Begin,
    Bucket,
    Commit,
    Done,
    Message,
    Prepare,
    Probe,
    Refused,
    State,
    Verify,
)
from miles_sync.receivers import Receiver
from miles_sync.transports import Inlet
from miles_sync.transports.gloo import GlooInlet
from miles_sync.transports.shm import ShmInlet, read_probe

_log = logging.getLogger(__name__)

MAX_DEADLINE_S = 24 * 3600.0
_NOTICE_S = 1.0  # how often a connection looks whether the sender was silent for too long
_LEAVE_S = 1.0  # how long a newcomer waits for a connection that is about to end

IDLE, BEGUN, PREPARED, RECEIVING, VERIFIED = "idle", "begun", "prepared", "receiving", "verified"


class Staging:
    """One receiver's transactions: at most one sender, at most one transaction, the committed version.

    It outlives connections: a sender that comes back finds version, digest and layout. Calls may come from the
    connection's thread and from the thread that owns the weights; each holds the lock for its duration.

    Args:
        receiver: Whose weights change.
        name: For messages and errors.
        remote_orders: Whether Prepare and Commit come through the owner of the weights, by `order`, and not
            on the channel (an engine, whose main loop alone may touch them).
    """

    def __init__(self, receiver: Receiver, name: str, *, remote_orders: bool = False) -> None:
        """Start with nothing committed."""
        self._receiver = receiver
        self._name = name
        self._remote_orders = remote_orders
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._committed: Manifest | None = None
        self._fingerprint = ""
        self._dirty = False
        self._layout = ""  # of the tensors below
        self._checked = ""  # the layout that the receiver has been checked against
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._inlet: Inlet | None = None
        self._patience = MAX_DEADLINE_S  # seconds of silence tolerated in a transaction
        self._reset()

    # -- the connection ------------------------------------------------------------------------------

    def serve(self, channel: Channel, deadline_s: float) -> None:
        """Answer a sender until it goes. Refuses it with `BusyError` while another is connected."""
        try:
            self._welcome(channel, deadline_s)
            while True:
                if channel.poll(_NOTICE_S):
                    message = channel.receive(Deadline(self._patience), "transfer")
                    self._silence = Deadline(self._patience)
                    answer = self._answer(channel, message)
                    if answer is not None:
                        channel.send(answer, Deadline(self._patience), "transfer")
                elif self._phase != IDLE and self._silence.left() == 0:
                    raise TimeoutError(f"the sender was silent for {self._patience:g} s")
        except (SyncError, TimeoutError) as error:
            _log.info("%s: sender %s is gone: %s", self._name, channel.peer, error)
        finally:
            self._leave(channel)
            channel.close()

    def hang_up(self) -> None:
        """End the connection, if there is one."""
        channel = self._channel
        if channel is not None:
            channel.close()

    def _welcome(self, channel: Channel, deadline_s: float) -> None:
        # A sender that restarts may be back before the thread of its old connection has seen that one end.
        waiting = Deadline(_LEAVE_S)
        while (busy := self._claim(channel, deadline_s)) is not None and waiting.left():
            time.sleep(0.02)
        if busy is not None:
            reason = f"{self._name} is connected to the sender {busy.peer}: close that one first"
            channel.send(_refusal("Connect", BusyError(reason, stage="connect")), Deadline(5), "connect")
            raise BusyError(reason, stage="connect", peer=channel.peer)
        channel.send(self.state(recompute=False), Deadline(deadline_s), "connect")

    def _claim(self, channel: Channel, deadline_s: float) -> Channel | None:
        """Make a connection the receiver's own, unless there is one: then return that."""
        with self._lock:
            if self._channel is None:
                self._channel = channel
                self._patience = min(deadline_s, MAX_DEADLINE_S)
                return None
            return self._channel

    def _leave(self, channel: Channel) -> None:
        with self._lock:
            if self._channel is channel:
                self._channel = None
                self._reset()
                self._close_inlet()

    def _answer(self, channel: Channel, message: Message) -> Message | None:
        """Do what a message asks; every failure becomes a Refused, and the transaction is forgotten."""
        call = type(message).__name__
        try:
            with self._lock:
                return self._act(channel, message)
        except SyncError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the receiver's own code: report it, keep serving
            _log.exception("%s: %s failed", self._name, call)
            failure = SyncError(f"{type(error).__name__}: {error}", stage=_stage(message))
        with self._lock:
            self._reset()
            self._close_inlet()  # a sender waiting in a transport fails at once and comes to read why
        return _refusal(call, failure)

    def _act(self, channel: Channel, message: Message) -> Message | None:
        match message:
            case Begin():
                return self._begin(message)
            case Prepare() | Commit() if self._remote_orders:
                raise ProtocolError("this order comes through the engine", stage=_stage(message))
            case Prepare(txn=txn):
                return self._prepare(txn)
            case Attach():
                return self._attach(channel, message)
            case Bucket():
                return self._bucket(message)
            case Verify():
                return self._verify(message)
            case Commit(txn=txn):
                return self._commit(txn)
            case Abort():
                self._reset()
                return Done("Abort", message.txn)
            case Probe(segment=segment):
                return Done("Probe", detail=read_probe(segment))
            case Ask(recompute=recompute):
                return self.state(recompute=recompute)
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__}", stage="transfer")

    # -- the transaction -----------------------------------------------------------------------------

    def _begin(self, message: Begin) -> Done:
        self._reset()
        if not 0 < message.deadline_s <= MAX_DEADLINE_S:
            raise ManifestError(f"deadline_s={message.deadline_s} is out of range", stage="begin")
        manifest = manifests.decode(message.manifest)
        committed = self._committed
        if committed is not None and manifest.version <= committed.version and not self._dirty:
            raise VersionError(
                f"version {manifest.version} was offered, {committed.version} is committed: versions only grow",
                stage="begin",
            )
        self._patience = message.deadline_s
        self._silence = Deadline(self._patience)
        layout = manifest.layout_id()
        if layout != self._layout:
            self._allocate(manifest, layout)
        self._manifest, self._txn = manifest, message.txn
        self._phase = BEGUN if layout != self._checked else PREPARED
        return Done("Begin", message.txn, detail=self._phase)

    def _allocate(self, manifest: Manifest, layout: str) -> None:
        """Make the staging buffer of a layout; the one before goes first, so that never two are held."""
        self._layout, self._tensors = "", {}
        self._flat = torch.empty(0, dtype=torch.uint8)
        self._flat = torch.zeros(manifest.total_bytes, dtype=torch.uint8)
        self._tensors = manifests.views(manifest.entries, self._flat)
        self._layout = layout

    def _prepare(self, txn: str) -> Done:
        self._expect(txn, "begin", BEGUN, PREPARED)
        self._receiver.check(self._tensors)
        self._checked = self._layout
        self._phase = PREPARED
        return Done("Prepare", txn)

    def _attach(self, channel: Channel, message: Attach) -> Done:
        self._expect(message.txn, "transfer", PREPARED)
        self._close_inlet()
        deadline = Deadline(self._patience)
        if message.kind == "shm":
            self._inlet = ShmInlet(message.address, message.nbytes)
        elif message.kind == "gloo":
            self._inlet = GlooInlet(message.address, channel.local_host, deadline)
        else:
            raise TransportError(f"transport {message.kind!r} is not known here", stage="transfer")
        return Done("Attach", message.txn)

    def _bucket(self, message: Bucket) -> None:
        if message.txn != self._txn:
            return  # its transaction has failed and that was said
        self._expect(message.txn, "transfer", PREPARED, RECEIVING)
        start, stop = message.start, message.stop
        fits = start == self._received < stop <= self._flat.numel() and not start % CHUNK_BYTES
        if self._inlet is None or not fits:
            raise ProtocolError(f"bucket {start}..{stop} after {self._received}", stage="transfer")
        self._phase = RECEIVING
        piece = self._flat[start:stop]
        self._inlet.receive(start, piece, Deadline(self._patience))
        self._digest.update(start, piece)
        self._received = stop

    def _verify(self, message: Verify) -> Done:
        self._expect(message.txn, "verify", RECEIVING)
        if self._received != self._flat.numel():
            raise CorruptError(f"{self._received} of {self._flat.numel()} bytes arrived", stage="verify")
        digest = self._digest.hexdigest(self._layout)
        if digest != message.digest:
            raise CorruptError(
                f"digest {digest} arrived where {message.digest} was sent: the bytes changed on the way",
                stage="verify",
            )
        assert self._manifest is not None
        self._manifest = Manifest(self._manifest.version, self._manifest.entries, self._manifest.total_bytes, digest)
        self._phase = VERIFIED
        return Done("Verify", message.txn, detail=digest)

    def _commit(self, txn: str) -> Done:
        self._expect(txn, "commit", VERIFIED)
        manifest = self._manifest
        assert manifest is not None
        self._dirty = True
        try:
            self._receiver.load(self._tensors)
        except Exception as error:
            raise CommitError(
                f"{self._name} failed while loading ({type(error).__name__}: {error}) and may serve a mixture: "
                "push the version again, or restart it",
                stage="commit",
            ) from error
        self._fingerprint = self._receiver.fingerprint()
        self._committed, self._dirty = manifest, False
        self._reset()
        return Done("Commit", txn, detail=manifest.digest)

    def order(self, order: Prepare | Commit) -> None:
        """Carry out an order that came through the weights' owner, on its thread; the answer goes to the sender.

        A stale order (of a transaction that was given up) changes nothing and is answered to nobody.
        """
        channel = self._channel
        if channel is None or order.txn != self._txn:
            _log.warning("%s: stale %s ignored", self._name, type(order).__name__)
            return
        answer = self._carry_out(order)
        try:
            channel.send(answer, Deadline(self._patience), _stage(order))
        except SyncError as error:
            _log.warning("%s: nobody to answer: %s", self._name, error)

    def _carry_out(self, order: Prepare | Commit) -> Message:
        call = type(order).__name__
        try:
            with self._lock:
                return self._prepare(order.txn) if isinstance(order, Prepare) else self._commit(order.txn)
        except SyncError as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - the engine must survive whatever its loader raises
            _log.exception("%s: %s failed", self._name, call)
            failure = SyncError(f"{type(error).__name__}: {error}", stage=_stage(order))
        with self._lock:
            self._reset()
        return _refusal(call, failure)

    # -- what is served ------------------------------------------------------------------------------

    def state(self, *, recompute: bool) -> State:
        """What is served. With `recompute`, the live weights are read and compared with those committed."""
        with self._lock:
            committed = self._committed
            intact = None
            if recompute and committed is not None:
                intact = self._receiver.fingerprint() == self._fingerprint
            return State(
                receiver=self._name,
                version=-1 if committed is None else committed.version,
                digest="" if committed is None else committed.digest,
                layout=self._checked,
                attached="" if self._inlet is None else self._inlet.address,
                intact=intact,
                dirty=self._dirty,
            )

    # -- housekeeping --------------------------------------------------------------------------------

    def _expect(self, txn: str, stage: str, *phases: str) -> None:
        if txn != self._txn or self._phase not in phases:
            raise ProtocolError(f"out of turn: the transaction is {self._phase}", stage=stage)

    def _reset(self) -> None:
        """Forget the transaction; staging memory and transport stay for the next."""
        self._phase = IDLE
        self._txn = ""
        self._manifest: Manifest | None = None
        self._received = 0
        self._digest = Digest()
        self._silence = Deadline(self._patience)

    def _close_inlet(self) -> None:
        inlet, self._inlet = self._inlet, None
        if inlet is not None:
            inlet.close()


def _refusal(call: str, error: SyncError) -> Refused:
    return Refused(call, type(error).__name__, error.stage, error.reason)


def _stage(message: Message) -> str:
    match message:
        case Begin() | Prepare():
            return "begin"
        case Verify():
            return "verify"
        case Commit():
            return "commit"
        case Ask():
            return "status"
        case _:
            return "transfer"
