"""A connected receiver, seen from the sender: calls and answers."""

from __future__ import annotations

import secrets

import torch

from miles_sync.channel import Channel, Deadline
from miles_sync.errors import FAMILY, ProtocolError, SyncError, TransportError
from miles_sync.messages import Ask, Done, Message, Probe, Refused, State
from miles_sync.targets import Target
from miles_sync.transports.shm import Segment

_PROBE_CHARS = 32


class Peer:
    """One target, connected.

    Attributes:
        target: Whom.
        channel: The control channel.
        state: What it last said it serves.
        kind: The transport towards it, "" where none was chosen yet.
        why: Why that one.
        attached: Address of the outlet that it has open, or "".
        unshared: Why it cannot read segments of ours; "" where it can.
    """

    def __init__(self, target: Target, channel: Channel, deadline: Deadline) -> None:
        """Hear what the receiver serves. Raises `BusyError` where it has another sender."""
        self.target = target
        self.channel = channel
        self.kind = self.why = self.attached = ""
        self._early: list[Done] = []
        self.state = self._state(deadline)
        self.unshared = self._probe(deadline)

    @property
    def name(self) -> str:
        """The target's."""
        return self.target.name

    def call(self, message: Message, stage: str, deadline: Deadline) -> Done:
        """Send a message and wait for its answer."""
        self.channel.send(message, deadline, stage)
        return self.answer(type(message).__name__, stage, deadline)

    def answer(self, call: str, stage: str, deadline: Deadline) -> Done:
        """Wait for the answer to `call`. Raises what the receiver refused with, as a `SyncError`."""
        message = self._early.pop(0) if self._early else self.channel.receive(deadline, stage)
        self._raise_refusal(message)
        if not isinstance(message, Done) or message.call != call:
            raise ProtocolError(f"{message} is no answer to {call}", stage=stage, peer=self.name)
        return message

    def listen(self, seconds: float, stage: str) -> None:
        """Raise what the receiver has to say against a transfer, or its end; an answer is kept for who waits for it."""
        if self.channel.poll(seconds):
            message = self.channel.receive(Deadline(1), stage)
            self._raise_refusal(message)
            if not isinstance(message, Done):
                raise ProtocolError(f"{message} came unasked", stage=stage, peer=self.name)
            self._early.append(message)

    def drain(self, call: str, deadline: Deadline) -> None:
        """Skip answers to earlier calls until the one to `call`."""
        self._early.clear()
        while True:
            message = self.channel.receive(deadline, "abort")
            if isinstance(message, Done | Refused) and message.call == call:
                return

    def ask(self, deadline: Deadline, *, recompute: bool = False) -> State:
        """Ask what it serves, and remember the answer."""
        self.channel.send(Ask(recompute), deadline, "status")
        self.state = self._state(deadline, "status")
        return self.state

    def close(self) -> None:
        """End the connection; the receiver forgets any open transaction."""
        self.channel.close()

    def _probe(self, deadline: Deadline) -> str:
        """Try whether the receiver can read a segment of ours. Returns "" or the reason why not."""
        content = secrets.token_hex(_PROBE_CHARS // 2)
        try:
            segment = Segment(_PROBE_CHARS)
        except TransportError as error:
            return error.reason
        try:
            segment.data.copy_(torch.tensor(list(content.encode()), dtype=torch.uint8))
            done = self.call(Probe(segment.address), "connect", deadline)
        except TransportError as error:
            return error.reason
        finally:
            segment.close()
        return "" if done.detail == content else "the receiver read another segment of that name"

    def _state(self, deadline: Deadline, stage: str = "connect") -> State:
        message = self.channel.receive(deadline, stage)
        self._raise_refusal(message)
        if not isinstance(message, State):
            raise ProtocolError(f"{message} where its state was due", stage=stage, peer=self.name)
        return message

    def _raise_refusal(self, message: Message) -> None:
        if isinstance(message, Refused):
            kind = FAMILY.get(message.kind, SyncError)
            raise kind(message.reason, stage=message.stage, peer=self.name)
