"""A folder of versions: full ones, and those that say only what changed since the one before.

    v0000000007/full.safetensors            every tensor, under its own name: any reader of safetensors loads it
    v0000000008/delta.safetensors           per changed tensor a frame (`miles_sync.disk.codec`), against version 7
    latest                                  the newest version's number

A version is written under another name, synchronised, and renamed into place; `latest` is replaced last, in the same
way. So a reader sees whole versions only, however a writer ends. The header of each file names version, base and
digest; the digest (that of `miles_sync.digest`, over names, shapes and every byte) is computed anew by whoever reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from miles_sync import tensorfile
from miles_sync.disk.codec import apply, packed
from miles_sync.errors import CorruptError, SyncError, VersionError
from miles_sync.manifest import TensorMeta, describe
from miles_sync.receivers import fingerprint

_VERSION = re.compile(r"v(\d{10})")
_NOTES = "miles-sync"


class _Notes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file says of itself: its version, the one that it changes (-1: none), its digest, the order of tensors."""

    version: int
    base: int
    digest: str
    order: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """One version, read and verified: a source, whose tensors stay where they are.

    Attributes:
        version: Of the weights.
        digest: Of every byte, names and shapes, as a receiver will compute it.
        tensors: By name, in host memory.
    """

    version: int
    digest: str
    tensors: Mapping[str, torch.Tensor]

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, dtype and shape of each tensor."""
        return [describe(name, tensor) for name, tensor in self.tensors.items()]

    def held(self) -> Sequence[torch.Tensor]:
        """The tensors."""
        return list(self.tensors.values())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors."""
        return iter(self.tensors.items())


class WeightFolder:
    """Writes and reads versions. One writer at a time; any number of readers.

    Args:
        path: The folder; made where it is not there.
        keep: How many of the newest versions stay readable; what they need of older ones stays too.
        full_every: Every so many versions one is full: a late joiner reads at most that many files.
    """

    def __init__(self, path: Path | str, *, keep: int = 4, full_every: int = 8) -> None:
        """Read nothing yet. Raises `ValueError` for bounds below 1."""
        if keep < 1 or full_every < 1:
            raise ValueError(f"keep={keep} and full_every={full_every} must be 1 or more")
        self.path = Path(path)
        self._keep, self._full_every = keep, full_every
        self.path.mkdir(parents=True, exist_ok=True)

    def latest(self) -> int:
        """The newest version, -1 where there is none. Raises `CorruptError`."""
        try:
            text = (self.path / "latest").read_text()
        except FileNotFoundError:
            return -1
        if not text.strip().isdigit():
            raise CorruptError(f"{self.path / 'latest'} holds {text[:20]!r}, not a version", stage="begin")
        return int(text)

    def versions(self) -> list[int]:
        """All that are there, oldest first."""
        return sorted(int(match[1]) for entry in self.path.iterdir() if (match := _VERSION.fullmatch(entry.name)))

    def committed(self) -> tuple[int, str]:
        """The newest version and its digest, (-1, "") where there is none. Raises `CorruptError`, `VersionError`."""
        version = self.latest()
        return (version, self._notes(version).digest) if version >= 0 else (-1, "")

    # -- writing -------------------------------------------------------------------------------------

    def publish(
        self, tensors: Mapping[str, torch.Tensor], version: int, digest: str, base: Published | None = None
    ) -> int:
        """Write a version: what changed since `base`, or all of it.

        Args:
            tensors: By name, in host memory.
            version: Higher than all that are there.
            digest: Of the tensors.
            base: The latest version as it was read or published, unchanged since; None for a full one. Taken only where
                its tensors are of the same kind and no full one is due.

        Returns:
            Bytes written. Raises `VersionError` for one that is not newer.
        """
        latest = self.latest()
        if version <= latest:
            raise VersionError(f"{self.path} has version {latest}: versions only grow", stage="begin")
        if base is not None and (base.version != latest or self._full_is_due() or not _alike(base.tensors, tensors)):
            base = None
        scratch = self.path / f".writing-{version:010}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        notes = _Notes(version, -1 if base is None else base.version, digest, tuple(tensors))
        if base is None:
            name, content = "full", tensors
        else:
            deltas = {key: packed(base.tensors[key], tensor.cpu().contiguous()) for key, tensor in tensors.items()}
            name, content = "delta", {key: delta for key, delta in deltas.items() if delta.numel()}
        header = {"format": "pt", _NOTES: msgspec.json.encode(notes).decode()}
        nbytes = tensorfile.write(scratch / f"{name}.safetensors", content, header)
        _sync_directory(scratch)
        shutil.rmtree(self._of(version), ignore_errors=True)  # of a writer that ended before it said `latest`
        scratch.rename(self._of(version))
        _sync_directory(self.path)
        self._say_latest(version)
        self._forget_old()
        return nbytes

    def _full_is_due(self) -> bool:
        try:
            return len(self._chain(self.latest())) >= self._full_every
        except SyncError:
            return True  # what cannot be read is nothing to build on

    def _say_latest(self, version: int) -> None:
        scratch = self.path / ".writing-latest"
        with scratch.open("w") as file:
            file.write(f"{version}\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.rename(self.path / "latest")
        _sync_directory(self.path)

    def _forget_old(self) -> None:
        versions = self.versions()
        needed = set(versions[-self._keep :])
        for kept in versions[-self._keep :]:
            with contextlib.suppress(SyncError):  # a broken one is the reader's to name
                needed.update(self._chain(kept))
        for version in versions:
            if version not in needed:
                shutil.rmtree(self._of(version), ignore_errors=True)  # a reader may hold it: it has its mapping

    # -- reading -------------------------------------------------------------------------------------

    def read(self, version: int | None = None, after: Published | None = None) -> Published:
        """Read a version and verify its digest.

        Args:
            version: The latest where it is None.
            after: An older version, read before: only what changed since is read, where that is all deltas. Its
                tensors are changed in place, so it must not be used any more, even where this raises.

        Raises:
            VersionError: There is no such version.
            CorruptError: A file is missing, cut short or changed: the message names it.
        """
        version = self.latest() if version is None else version
        if version < 0:
            raise VersionError(f"{self.path} has no version yet", stage="begin")
        if after is not None and after.version == version:
            return after
        chain = self._chain(version)
        if after is not None and after.version in chain:
            tensors = dict(after.tensors)
            chain = chain[: chain.index(after.version)]
        else:
            tensors = {name: tensor.clone() for name, tensor in self._file(chain.pop())[0].items()}
        notes = self._notes(version)
        for link in reversed(chain):
            for name, delta in self._file(link)[0].items():
                if name not in tensors:
                    raise CorruptError(f"{self._of(link)} changes {name!r}, which is not there", stage="transfer")
                apply(tensors[name], delta, f"{self._of(link)} {name!r}")
        if set(notes.order) != tensors.keys():
            raise CorruptError(f"{self._of(version)} has other tensors than it says", stage="transfer")
        found = {name: tensors[name] for name in notes.order}
        digest = fingerprint(found)()
        if digest != notes.digest:
            reason = f"{self._of(version)} has digest {digest}, {notes.digest} was published"
            raise CorruptError(reason, stage="verify")
        return Published(version, digest, found)

    def _chain(self, version: int) -> list[int]:
        """A version and those it changes, down to a full one."""
        chain: list[int] = []
        while version >= 0:
            chain.append(version)
            base = self._notes(version).base
            if base >= version:
                raise CorruptError(f"{self._of(version)} changes version {base}, which is no older", stage="begin")
            version = base
        return chain

    def _notes(self, version: int) -> _Notes:
        path = self._path(version)
        notes = tensorfile.header_of(path)[1]
        try:
            found = msgspec.json.decode(notes.get(_NOTES, ""), type=_Notes)
        except msgspec.DecodeError as error:
            raise CorruptError(f"{path}: no notes of ours: {error}", stage="begin") from error
        if found.version != version or (found.base < 0) != (path.name == "full.safetensors"):
            raise CorruptError(f"{path} says that it is version {found.version} on {found.base}", stage="begin")
        return found

    def _file(self, version: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return tensorfile.read(self._path(version))

    def _path(self, version: int) -> Path:
        folder = self._of(version)
        if not folder.is_dir():
            raise VersionError(f"version {version} is not in {self.path}: it has {self.versions()}", stage="begin")
        full = folder / "full.safetensors"
        return full if full.exists() else folder / "delta.safetensors"

    def _of(self, version: int) -> Path:
        return self.path / f"v{version:010}"


def _alike(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    def kinds(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.dtype, torch.Size]]:
        return sorted(((name, t.dtype, t.shape) for name, t in tensors.items()), key=lambda kind: kind[0])

    return kinds(one) == kinds(other)


def _sync_directory(path: Path) -> None:
    """See that names are on the disk, where the file system lets a directory be synchronised."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
