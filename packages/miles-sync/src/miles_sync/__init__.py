"""Moving model weights between processes, all or nothing.

    begin(version) ▸ transfer ▸ verify ▸ commit,  or abort with the old weights still serving

`WeightSync` sends, `serve` receives into a module, `miles_sync.sglang` receives inside an SGLang engine.
"""

from miles_sync.errors import (
    AuthError,
    BusyError,
    CommitError,
    CorruptError,
    DeadlineError,
    DirtyError,
    DriftError,
    ManifestError,
    MismatchError,
    PeerLostError,
    ProtocolError,
    SyncError,
    TransportError,
    VersionError,
)
from miles_sync.manifest import Entry, Manifest, TensorMeta
from miles_sync.receivers import ModuleReceiver, Piece, Pieces, Receiver
from miles_sync.report import Route, SyncReport, TargetState
from miles_sync.server import ReceiverServer, serve
from miles_sync.shared import SharedArena
from miles_sync.sources import Source
from miles_sync.sync import WeightSync
from miles_sync.targets import ReceiverTarget, Target

__all__ = [  # noqa: RUF022 - grouped
    # sending
    "WeightSync",
    "Target",
    "ReceiverTarget",
    "Source",
    "SharedArena",
    "TensorMeta",
    # receiving
    "serve",
    "ReceiverServer",
    "Receiver",
    "ModuleReceiver",
    "Piece",
    "Pieces",
    # what was sent
    "Manifest",
    "Entry",
    "SyncReport",
    "Route",
    "TargetState",
    # what can go wrong
    "SyncError",
    "AuthError",
    "BusyError",
    "CommitError",
    "CorruptError",
    "DeadlineError",
    "DirtyError",
    "DriftError",
    "ManifestError",
    "MismatchError",
    "PeerLostError",
    "ProtocolError",
    "TransportError",
    "VersionError",
]
