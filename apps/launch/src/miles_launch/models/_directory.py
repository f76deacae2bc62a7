"""A directory that is either complete or not there."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from miles_core import InputError


def make_directory(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `path`, then rename it to `path`; an existing `path` is left as it is.

    Two processes may do this at once: the first to finish wins, and the other's folder is removed.

    Raises:
        InputError: `path` exists without a config.json, or cannot be written.
    """
    if _is_finished(path):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
            partial = Path(beside) / path.name
            partial.mkdir()
            write(partial)
            try:
                partial.rename(path)
            except OSError:
                if not _is_finished(path):
                    raise
    except OSError as error:
        raise InputError(
            "model.path", str(path), f"cannot be written ({error})", "Free some space there, or choose another folder."
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as transformers lays out its JSON files: two spaces, one newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_finished(path: Path) -> bool:
    if (path / "config.json").is_file():
        return True
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            "model.path",
            str(path),
            "exists and is no Hugging Face model directory (it has no config.json)",
            "Remove it, or choose another folder.",
        )
    return False
