import json
from pathlib import Path
from typing import Any

import pytest

from miles_core.observe import Span, TraceFile

SPANS = [
    Span("generate", 1_000_000, 5_000),
    Span("train/update", 1_006_000, 2_000),
    Span("train", 1_005_000, 4_500),
]


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def test_spans_become_complete_events_in_microseconds_on_a_row_per_outermost_phase(tmp_path: Path):
    path = tmp_path / "run.json"
    trace = TraceFile(path)
    for span in SPANS:
        trace.add(span)
    trace.close()
    names = {event["tid"]: event["args"]["name"] for event in events(path) if event["ph"] == "M"}
    spans = [event for event in events(path) if event["ph"] == "X"]
    assert [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in spans] == [
        ("generate", "generate", 1000.0, 5.0),
        ("train", "update", 1006.0, 2.0),
        ("train", "train", 1005.0, 4.5),
    ]
    assert all({"name", "ph", "pid", "tid"} <= event.keys() for event in events(path))


def test_a_trace_of_nothing_is_an_empty_list(tmp_path: Path):
    TraceFile(tmp_path / "run.json").close()
    assert events(tmp_path / "run.json") == []


def test_the_trace_of_a_killed_run_needs_only_its_bracket(tmp_path: Path):
    path = tmp_path / "run.json"
    trace = TraceFile(path)
    trace.add(SPANS[0])
    assert json.loads(path.read_text() + "]")[-1]["name"] == "generate"
    trace.close()


@pytest.mark.parametrize("ending", ["closed", "killed", "cut"])
def test_a_resumed_run_continues_the_trace(tmp_path: Path, ending: str):
    path = tmp_path / "run.json"
    trace = TraceFile(path)
    for span in SPANS:
        trace.add(span)
    killed = path.read_bytes()
    trace.close()
    if ending != "closed":
        path.write_bytes(killed if ending == "killed" else killed[:-7])
    resumed = TraceFile(path)
    resumed.add(Span("train", 2_000_000, 10))
    resumed.add(Span("push", 3_000_000, 10))
    resumed.close()
    found = events(path)
    spans = [event for event in found if event["ph"] == "X"]
    kept = 2 if ending == "cut" else 3
    assert [event["name"] for event in spans] == [*("generate", "update", "train")[:kept], "train", "push"]
    rows = {event["args"]["name"]: event["tid"] for event in found if event["ph"] == "M"}
    assert sorted(rows) == ["generate", "push", "train"] and len(set(rows.values())) == 3
    assert spans[-2]["tid"] == rows["train"]


def test_a_trace_without_a_complete_event_starts_anew(tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text('[\n{"name": "gen')
    trace = TraceFile(path)
    trace.add(SPANS[0])
    trace.close()
    assert [event["ph"] for event in events(path)] == ["M", "X"]
