"""Folders that are complete or not there: written under another name, synced, renamed; a pointer names the newest."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

LATEST = "latest"
_PARTIAL = ".partial-"


def begin(target: Path, replaces: Callable[[Path], bool] = lambda target: False) -> Path:
    """Make an empty folder beside `target` to write into; what an earlier crash left there is removed.

    Args:
        target: what `publish` will make.
        replaces: whether a `target` that is there may go when the new one is complete.

    Raises:
        FileExistsError: `target` is there, and may not go.
    """
    if target.exists() and not replaces(target):
        raise FileExistsError(f"{target} exists: choose another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_name(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def partial_name(target: Path) -> Path:
    """Where `target` is while it is not complete."""
    return target.with_name(_PARTIAL + target.name)


def discard(target: Path) -> None:
    """Give up what was written since `begin`: a failed attempt should not keep a disk full."""
    shutil.rmtree(partial_name(target), ignore_errors=True)


def publish(target: Path) -> None:
    """Bring what was written since `begin` to the disk, then give it its name; what had that name goes."""
    partial = partial_name(target)
    for folder, _, files in os.walk(partial):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    old = target.with_name(_PARTIAL + "old-" + target.name)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def point_to(target: Path) -> None:
    """Make `latest` beside `target` name it, in one step."""
    pointer = target.with_name(LATEST)
    written = target.with_name(_PARTIAL + LATEST)
    written.write_text(target.name + "\n", encoding="utf-8")
    _sync(written)
    written.replace(pointer)
    _sync(target.parent)


def is_latest(target: Path) -> bool:
    """Whether `latest` beside `target` names it."""
    pointer = target.with_name(LATEST)
    return pointer.is_file() and pointer.read_text(encoding="utf-8").strip() == target.name


def resolve(path: Path) -> Path | None:
    """The folder that `path` means: itself, or the one that `latest` in it names; None if there is neither."""
    pointer = path / LATEST
    if pointer.is_file():
        target = path / pointer.read_text(encoding="utf-8").strip()
        return target if target.is_dir() else None
    return path if path.is_dir() else None


def keep_newest(target: Path, count: int, marker: str) -> None:
    """Remove siblings of `target` that hold a file `marker`, but for the `count` most recently written ones."""
    complete = [file.parent for file in target.parent.glob(f"*/{marker}") if not file.parent.name.startswith(_PARTIAL)]
    complete.sort(key=lambda folder: (folder / marker).stat().st_mtime_ns, reverse=True)
    for folder in complete[count:]:
        if folder != target:
            shutil.rmtree(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
