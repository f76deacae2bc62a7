"""What can go wrong in a transaction: one family, each error naming stage, peer and reason."""

from __future__ import annotations


class SyncError(RuntimeError):
    """A weight transaction failed; unless it says otherwise, the old weights are still serving.

    Attributes:
        stage: Where it failed: "connect", "begin", "transfer", "verify", "commit", "status".
        peer: The other side, as the caller named it; "" where there is none.
        reason: One sentence on what happened and what to do.
    """

    def __init__(self, reason: str, *, stage: str, peer: str = "") -> None:
        """Name the reason, the stage and the peer."""
        self.stage = stage
        self.peer = peer
        self.reason = reason
        super().__init__(f"{stage}{f' with {peer}' if peer else ''}: {reason}")


class DeadlineError(SyncError):
    """A wait passed its deadline."""


class PeerLostError(SyncError):
    """The connection to the peer ended."""


class AuthError(SyncError):
    """The peer does not hold the same token."""


class BusyError(SyncError):
    """The receiver is connected to another sender."""


class ProtocolError(SyncError):
    """A message was malformed, too long, forged or out of turn."""


class ManifestError(SyncError):
    """A manifest is malformed, inconsistent or over a limit."""


class MismatchError(SyncError):
    """The offered tensors do not fit the receiver: names, shapes or engine settings."""


class VersionError(SyncError):
    """The version is older than the receiver's, or the same with other weights."""


class CorruptError(SyncError):
    """What arrived is not what was sent: digest differs, or data is short."""


class TransportError(SyncError):
    """A transport cannot be used between these two processes."""


class CommitError(SyncError):
    """The commit itself failed; the reason says what each receiver serves now."""


class DriftError(SyncError):
    """A receiver no longer serves what was committed to it."""


class DirtyError(SyncError):
    """The weights may be a mixture of two versions: a transaction ended half-way, and none has committed since."""


FAMILY: dict[str, type[SyncError]] = {
    kind.__name__: kind
    for kind in (
        SyncError,
        DeadlineError,
        PeerLostError,
        AuthError,
        BusyError,
        ProtocolError,
        ManifestError,
        MismatchError,
        VersionError,
        CorruptError,
        TransportError,
        CommitError,
        DriftError,
        DirtyError,
    )
}
"""The family by class name: an error crosses the wire as its name, never as an object."""
