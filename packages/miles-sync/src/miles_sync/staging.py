"""The receiver's side of the protocol: the state machine of `miles_sync.messages`, and the loop that feeds it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from miles_sync import manifest as manifests
from miles_sync.arrival import Arrival
from miles_sync.channel import Channel, Deadline
from miles_sync.digest import warm
from miles_sync.errors import (
    BusyError,
    CommitError,
    CorruptError,
    ManifestError,
    PeerLostError,
    ProtocolError,
    SyncError,
    VersionError,
)
from miles_sync.inlets import open_inlet, reach
from miles_sync.messages import (
    Abort,
    Ask,
    Attach,
    Begin,
    Commit,
    Done,
    Filled,
    Message,
    Prepare,
    Probe,
    Refused,
    State,
    Stream,
    Verify,
)
from miles_sync.receivers import Receiver
from miles_sync.transports import Inlet
from miles_sync.transports.shm import read_probe

_log = logging.getLogger(__name__)

MAX_DEADLINE_S = 24 * 3600.0
_NOTICE_S = 1.0  # how often a connection looks whether the sender was silent for too long
_LEAVE_S = 1.0  # how long a newcomer waits for a connection that is about to end

IDLE, BEGUN, PREPARED, RECEIVED, VERIFIED = "idle", "begun", "prepared", "received", "verified"


class Staging:
    """One receiver's transactions: at most one sender, at most one transaction, the committed version.

    It outlives connections: a sender that comes back finds version, digest and layout. Calls may come from the
    connection's thread and from the thread that owns the weights; each holds the lock for its duration.

    Args:
        receiver: Whose weights change.
        name: For messages and errors.
        remote_orders: Whether Prepare and Commit come through the owner of the weights, by `order`, and not
            on the channel (an engine, whose main loop alone may touch them).
        committed: Version and digest that its weights have already; None where they came from elsewhere.
    """

    def __init__(
        self,
        receiver: Receiver,
        name: str,
        *,
        remote_orders: bool = False,
        committed: tuple[int, str] | None = None,
    ) -> None:
        """Start with no transaction."""
        self._receiver = receiver
        self._name = name
        self._remote_orders = remote_orders
        self._lock = threading.RLock()
        self._channel: Channel | None = None
        self._unread: Message | None = None  # heard in the middle of a transfer
        self._committed = committed
        self._baseline: Callable[[], str] | None = None if committed is None else lambda: committed[1]
        self._dirty = False
        self._checked = ""  # the layout that the receiver has been checked against
        self._arrival = Arrival(receiver)
        self._inlet: Inlet | None = None
        self._reach = reach(receiver.device)
        self._patience = MAX_DEADLINE_S  # seconds of silence tolerated in a transaction
        self._open = False  # whether the receiver is between its begin and commit
        self._reset()

    # -- the connection ------------------------------------------------------------------------------

    def serve(self, channel: Channel, deadline_s: float) -> None:
        """Answer a sender until it goes. Refuses it with `BusyError` while another is connected."""
        try:
            self._welcome(channel, deadline_s)
            while True:
                if self._unread is not None or channel.poll(_NOTICE_S):
                    message, self._unread = self._unread, None
                    if message is None:
                        message = channel.receive(Deadline(self._patience), "transfer")
                    self._silence = Deadline(self._patience)
                    answer = self._answer(channel, message)
                    if answer is not None:
                        channel.send(answer, Deadline(self._patience), "transfer")
                    if isinstance(answer, Refused) and (answer.call, answer.kind) == ("Stream", "DeadlineError"):
                        raise TimeoutError(answer.reason)  # it may be frozen: make room for another
                elif self._forsaken():
                    raise TimeoutError(f"the sender was silent for {self._patience:g} s")
        except (SyncError, TimeoutError) as error:
            _log.info("%s: sender %s is gone: %s", self._name, channel.peer, error)
        finally:
            self._leave(channel)
            channel.close()

    def _forsaken(self) -> bool:
        """Whether the sender of an open transaction was silent for too long.

        Not while the weights' owner carries out an order: that time is its own, and the sender's clock starts after it.
        """
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._phase != IDLE and self._silence.left() == 0
        finally:
            self._lock.release()

    def hang_up(self) -> None:
        """End the connection, if there is one."""
        channel = self._channel
        if channel is not None:
            channel.close()

    @property
    def version(self) -> int:
        """The version last committed, -1 where none was."""
        return -1 if self._committed is None else self._committed[0]

    @property
    def dirty(self) -> bool:
        """Whether the weights may be a mixture: whoever owns them must not serve them."""
        return self._dirty

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
        if not self._lock.acquire(timeout=0.1):
            return self._channel or channel  # in the middle of a transfer
        with contextlib.ExitStack() as stack:
            stack.callback(self._lock.release)
            if self._channel is None:
                self._channel = channel
                self._patience = min(deadline_s, MAX_DEADLINE_S)
                return None
            return self._channel

    def _leave(self, channel: Channel) -> None:
        with self._lock:
            if self._channel is channel:
                self._channel = None
                self._unread = None
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
            case Stream(txn=txn):
                return self._receive(channel, txn)
            case Filled():
                return None  # of a transfer that has failed, and that was said
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
        if message.manifest:
            manifest = manifests.decode(message.manifest)
            if manifest.layout_id() != message.layout:
                raise ManifestError("the manifest does not have the layout that it was announced with", stage="begin")
            self._arrival.expect(manifest, message.layout)
        elif message.layout != self._arrival.layout:
            raise ManifestError("this layout is not known here: send the manifest", stage="begin")
        if message.version < self.version or (message.version == self.version and not self._dirty):
            raise VersionError(
                f"version {message.version} was offered, {self.version} is committed: versions only grow",
                stage="begin",
            )
        self._arrival.begin(message.version, message.mode, message.bucket_bytes, message.digest)
        self._patience = message.deadline_s
        self._silence = Deadline(self._patience)
        self._version, self._txn = message.version, message.txn
        told = message.mode == "staged" or not self._remote_orders
        self._phase = PREPARED if message.layout == self._checked and told else BEGUN
        return Done("Begin", message.txn, detail=self._phase)

    def _prepare(self, txn: str) -> Done:
        self._expect(txn, "begin", BEGUN, PREPARED)
        manifest = self._arrival.manifest
        if self._checked != self._arrival.layout:
            self._receiver.check(manifest)
            self._checked = self._arrival.layout
        if self._arrival.mode == "in_place" and self._remote_orders:
            self._start_installing()
        self._phase = PREPARED
        return Done("Prepare", txn)

    def _start_installing(self) -> None:
        """Tell the receiver that pieces follow; once."""
        if not self._open:
            self._receiver.begin(self._arrival.manifest, self._arrival.mode)
            self._open = True

    def _attach(self, channel: Channel, message: Attach) -> Done:
        self._expect(message.txn, "transfer", PREPARED)
        self._close_inlet()
        deadline = Deadline(self._patience)
        hear = self._listener(channel, message.txn)
        self._inlet = open_inlet(message, self._receiver.device, channel.local_host, deadline, hear)
        self._arrival.make_room(self._inlet)
        warm(self._receiver.device)
        return Done("Attach", message.txn)

    def _receive(self, channel: Channel, txn: str) -> None:
        """Take in all buckets."""
        if txn != self._txn:
            return  # its transaction has failed and that was said
        self._expect(txn, "transfer", PREPARED)
        if self._inlet is None:
            raise ProtocolError("no transport was attached", stage="transfer")
        if self._arrival.mode == "in_place":
            self._start_installing()
        self._arrival.receive(self._inlet, self._patience, self._listener(channel, txn), self._soil)
        self._phase = RECEIVED

    def _soil(self) -> None:
        """From now on the weights may be a mixture."""
        self._dirty = True

    def _listener(self, channel: Channel, txn: str) -> Callable[[float], None]:
        """What a wait for bytes calls: takes in Filled, and ends the wait where the sender says anything else."""

        def hear(seconds: float) -> None:
            if self._unread is None and channel.poll(seconds):
                message = channel.receive(Deadline(self._patience), "transfer")
                if isinstance(message, Filled):
                    if message.txn == txn:
                        self._arrival.filled(message.nbytes)
                    return
                self._unread = message
            elif self._unread is not None:
                time.sleep(seconds)
            if isinstance(self._unread, Abort):
                raise PeerLostError("the sender gave up", stage="transfer", peer=channel.peer)

        return hear

    def _verify(self, message: Verify) -> Done:
        self._expect(message.txn, "verify", RECEIVED)
        digest = self._arrival.digest()
        if digest != message.digest:
            raise CorruptError(
                f"digest {digest} arrived where {message.digest} was sent: the bytes changed on the way",
                stage="verify",
            )
        self._phase = VERIFIED
        return Done("Verify", message.txn, detail=digest)

    def _commit(self, txn: str) -> Done:
        self._expect(txn, "commit", VERIFIED)
        digest = self._arrival.digest()
        staged = self._arrival.mode == "staged"
        try:
            if staged:
                self._start_installing()
                self._soil()
                self._arrival.install()
            self._receiver.commit(self._version)
            self._open = False
        except Exception as error:
            raise CommitError(
                f"{self._name} failed while loading ({type(error).__name__}: {error}) and may serve a mixture: "
                "push the version again, or restart it",
                stage="commit",
            ) from error
        self._committed, self._dirty = (self._version, digest), False
        # Where live weights are what was sent, the digest says what they must be; else they are read once now.
        self._baseline = (lambda: digest) if self._receiver.exact and digest else self._receiver.fingerprint()
        self._reset()
        return Done("Commit", txn, detail=digest)

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
                try:
                    return self._prepare(order.txn) if isinstance(order, Prepare) else self._commit(order.txn)
                finally:
                    self._silence = Deadline(self._patience)
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
            version, digest = self._committed or (-1, "")
            intact = None
            if recompute and self._baseline is not None:
                intact = not self._dirty and self._receiver.fingerprint()() == self._baseline()
            device, devices, nccl = self._reach
            return State(
                receiver=self._name,
                version=version,
                digest=digest,
                layout=self._checked if self._checked == self._arrival.layout else "",
                attached="" if self._inlet is None else self._inlet.address,
                intact=intact,
                dirty=self._dirty,
                device=device,
                devices=devices,
                nccl=nccl,
            )

    # -- housekeeping --------------------------------------------------------------------------------

    def _expect(self, txn: str, stage: str, *phases: str) -> None:
        if txn != self._txn or self._phase not in phases:
            raise ProtocolError(f"out of turn: the transaction is {self._phase}", stage=stage)

    def _reset(self) -> None:
        """Forget the transaction; memory and transport stay for the next."""
        if self._open:
            self._open = False
            self._receiver.abandon()
        self._phase = IDLE
        self._txn = ""
        self._version = -1
        self._silence = Deadline(self._patience)

    def _close_inlet(self) -> None:
        inlet, self._inlet = self._inlet, None
        self._arrival.forget_places()
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
