"""metrics.jsonl: one JSON object a step, slash names, strict JSON.

    {"step": 3, "rollout/reward": 0.25, "train/grad_norm": null, "non_finite": {"train/grad_norm": "inf"}}

A line is written whole and reaches the operating system before `write` returns, so the file survives the death of the
process; `sync` makes it survive that of the machine.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from miles_core.errors import InputError


class Sink(Protocol):
    """Where the metrics of a step go, beside the file."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step; may hold non-finite numbers."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class MetricsLog:
    """Appends the metrics of each step to a file and passes them on to sinks."""

    def __init__(self, path: Path, start_step: int = 0, sinks: Sequence[Sink] = ()):
        """Open the file for the steps from `start_step` on.

        Args:
            path: the file; its folder must be there.
            start_step: first step that will be written. Records of this step and later ones, left by a run that is now
                resumed from an earlier checkpoint, are cut off.
            sinks: closed with the log.

        Raises:
            InputError: the file holds something else than metrics.
        """
        kept = _bytes_before(path, start_step) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(kept)
        self._sinks = tuple(sinks)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the record of `step`, then give it to the sinks."""
        line = json.dumps(_record(step, metrics), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, metrics)

    def sync(self) -> None:
        """Force what was written to the disk; a checkpoint that relies on these records calls this first."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the sinks, all of them, whatever one of them raises."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)
            stack.enter_context(self._file)
            self.sync()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in the order of their steps; non-finite numbers are None.

    Raises:
        InputError: the file holds something else than metrics. A last line without its end is left out.
    """
    return [record for _, record in _records(path)]


def _record(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    values = {name: value if type(value) is int else float(value) for name, value in metrics.items()}
    non_finite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    record: dict[str, Any] = {"step": step} | values | dict.fromkeys(non_finite)
    return record | {"non_finite": non_finite} if non_finite else record


def _bytes_before(path: Path, start_step: int) -> int:
    """Size of the records of the steps before `start_step`."""
    stop = 0
    for end, record in _records(path):
        if record["step"] >= start_step:
            break
        stop = end
    return stop


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each record with the offset in bytes of its end."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # the process died while it wrote
                return
            end += len(line)
            yield end, _parse(line, f"{path}, line {number}")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        int(record["step"])
    except (ValueError, TypeError, KeyError):
        shown = line[:80].decode("utf-8", "replace").rstrip("\n")
        rule = 'must be a JSON object with the field "step"'
        raise InputError(where, shown, rule, "Remove the line, or start under another name.") from None
    return record
