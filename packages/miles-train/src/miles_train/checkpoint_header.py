"""What a checkpoint says of itself, readable without torch and Megatron.

step-000010/
    trainer.json        what wrote it, and the caller's state
    megatron/           the trainer's own (see `miles_train.megatron.checkpoint`)
latest                  names the newest complete one; written last
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_train import folders
from miles_train.errors import CheckpointError

MARKER = "trainer.json"
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Header:
    """What trainer.json holds.

    Attributes:
        folder: the checkpoint.
        layout: sizes of the groups of ranks that wrote it, by Megatron's names.
        state: the caller's own.
    """

    folder: Path
    layout: Mapping[str, int]
    state: dict[str, Any]


def read_header(path: Path) -> Header:
    """Find a checkpoint and read its header, nothing else.

    Args:
        path: its folder, or the folder whose `latest` names it.

    Raises:
        CheckpointError: there is no checkpoint, or it is of another format.
    """
    folder = folders.resolve(path)
    file = None if folder is None else folder / MARKER
    if folder is None or file is None or not file.is_file():
        raise CheckpointError(
            f"there is no checkpoint in {path}: it needs {MARKER}, or `latest` naming a folder with one."
        )
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise CheckpointError(f"{file} has format {header['format']}: this version reads {_FORMAT}.")
        return Header(folder, header["layout"], header["state"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}. Resume from another checkpoint.") from None


def write_header(folder: Path, layout: Mapping[str, int], state: Mapping[str, Any], by: str) -> None:
    """Write trainer.json.

    Args:
        folder: the checkpoint, not yet published.
        layout: as in `Header`.
        state: JSON-able.
        by: name and version of what wrote it.
    """
    header = {
        "format": _FORMAT,
        "written_by": by,
        "layout": dict(layout),
        "state": dict(state),
    }
    (folder / MARKER).write_text(json.dumps(header, indent=1), encoding="utf-8")
