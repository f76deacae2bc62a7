"""Phases as a Chrome trace: open it at https://ui.perfetto.dev or chrome://tracing.

The JSON array format of the trace viewer, one event a line. Its closing bracket is optional there, so the trace of a
run that was killed opens too. A resumed run continues the file.
"""

import json
from pathlib import Path
from typing import Any

from miles_core.observe.timing import Span

_PID = 1  # the viewer groups rows by process; there is one, the driver


class TraceFile:
    """Appends spans to one file. Each outermost phase has a row of its own, so that phases may overlap."""

    def __init__(self, path: Path):
        """Open the file, new or left by an earlier run.

        Args:
            path: the file; its folder must be there.
        """
        kept, events = _complete_events(path.read_bytes()) if path.exists() else (0, [])
        names = [event for event in events if event["name"] == "thread_name"]
        self._rows: dict[str, int] = {event["args"]["name"]: event["tid"] for event in names}
        self._file = path.open("ab")
        self._file.truncate(kept)
        self._separator = b",\n" if events else b"[\n"

    def add(self, span: Span) -> None:
        """Append one phase."""
        top, name = span.name.partition("/")[0], span.name.rpartition("/")[2]
        event = {"name": name, "cat": "phase", "ph": "X", "pid": _PID, "tid": self._row(top)}
        self._write(event | {"ts": span.start_ns / 1e3, "dur": span.duration_ns / 1e3})  # microseconds

    def close(self) -> None:
        """Close the array and the file."""
        self._file.write(b"[]\n" if self._separator == b"[\n" else b"\n]\n")
        self._file.close()

    def _row(self, name: str) -> int:
        if name not in self._rows:
            self._rows[name] = len(self._rows) + 1
            event = {"name": "thread_name", "ph": "M", "pid": _PID, "tid": self._rows[name]}
            self._write(event | {"args": {"name": name}})
        return self._rows[name]

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(event).encode())
        self._file.flush()
        self._separator = b",\n"


def _complete_events(text: bytes) -> tuple[int, list[dict[str, Any]]]:
    """The events of a file of ours, without a last one that was cut short, and the bytes up to the end of the last."""
    events: list[dict[str, Any]] = []
    kept = end = 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        event = line.rstrip(b",\n")
        if event.startswith(b"{") and event.endswith(b"}"):
            events.append(json.loads(event))
            kept = end - (len(line) - len(event))
    return kept, events
