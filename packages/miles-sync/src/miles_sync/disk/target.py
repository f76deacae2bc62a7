"""A folder as a target of pushes: a receiver of its own, whose commit is the publication of a version."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from miles_sync.buckets import Pieces
from miles_sync.channel import Channel, Deadline, accept, dial, listen
from miles_sync.disk.folder import Published, WeightFolder
from miles_sync.errors import SyncError
from miles_sync.manifest import DTYPES, Manifest
from miles_sync.messages import Commit, Mode, Prepare
from miles_sync.receivers import fingerprint
from miles_sync.staging import Staging


class FolderReceiver:
    """Takes any tensors, and publishes them in its commit.

    It holds the version before in host memory, to find what changed: one copy of the weights, two while one arrives.
    The first version after a start is a full one.

    Attributes:
        device: Host memory.
        exact: True: what is published are the manifest's tensors.
    """

    device = torch.device("cpu")
    exact = True

    def __init__(self, folder: WeightFolder) -> None:
        """Receive into a folder."""
        self._folder = folder
        self._last: Published | None = None
        self._arriving: dict[str, torch.Tensor] = {}
        self._flat: list[torch.Tensor] = []

    def check(self, manifest: Manifest) -> None:
        """Anything fits."""

    def begin(self, manifest: Manifest, mode: Mode) -> None:
        """Make room."""
        self._arriving = {entry.name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for entry in manifest.entries}
        self._flat = [tensor.view(-1) for tensor in self._arriving.values()]

    def install(self, pieces: Pieces) -> None:
        """Keep them."""
        for piece in pieces:
            self._flat[piece.index][piece.start : piece.start + piece.data.numel()] = piece.data.reshape(-1)

    def commit(self, version: int) -> None:
        """Publish them."""
        digest = fingerprint(self._arriving)()
        self._folder.publish(self._arriving, version, digest, self._last)
        self._last = Published(version, digest, self._arriving)
        self._arriving, self._flat = {}, []

    def abandon(self) -> None:
        """Nothing was published."""
        self._arriving, self._flat = {}, []

    def fingerprint(self) -> Callable[[], str]:
        """Of what the folder holds: read from the disk."""
        return lambda: self._folder.read().digest


class FolderTarget:
    """Publishes what is pushed to it in a folder.

    Stages, digests and errors are those of any other receiver, for it is one, in this process: a commit that fails
    leaves the folder at the version before.

    Args:
        path: The folder; or a `WeightFolder`, to say how many versions are kept.
        name: For reports and errors.
    """

    def __init__(self, path: Path | str | WeightFolder, *, name: str = "") -> None:
        """Open nothing yet."""
        self._folder = path if isinstance(path, WeightFolder) else WeightFolder(path)
        self.name = name or str(self._folder.path)
        self._staging: Staging | None = None

    def connect(self, token: str, deadline: Deadline) -> Channel:
        """Have a thread of this process receive, and connect to it. Raises `CorruptError` for a folder that is."""
        if self._staging is None:
            version, digest = self._folder.committed()
            committed = None if version < 0 else (version, digest)
            self._staging = Staging(FolderReceiver(self._folder), self.name, committed=committed)
        with listen("127.0.0.1") as listener:
            attend = (self._staging, listener.getsockname()[1], token, deadline)
            threading.Thread(target=_attend, args=attend, name="miles-sync-folder", daemon=True).start()
            return accept(listener, token, deadline, self.name)

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        """Over the channel."""
        channel.send(order, deadline, "commit" if isinstance(order, Commit) else "begin")

    def published(self, deadline: Deadline) -> str | None:
        """None: readers ask the folder."""
        return None

    def publish(self, version: str, deadline: Deadline) -> None:
        """Nothing to correct."""


def _attend(staging: Staging, port: int, token: str, deadline: Deadline) -> None:
    """Answer the sender until it goes."""
    with contextlib.suppress(SyncError):  # it hears the same
        staging.serve(dial("127.0.0.1", port, token, deadline, "the sender"), deadline.seconds)
