import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import InputError
from miles_core.observe import MetricsLog, read_metrics


class Collector:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def write_steps(path: Path, steps: range, value: float = 0.0) -> None:
    log = MetricsLog(path, steps.start)
    for step in steps:
        log.write(step, {"rollout/reward": value + step})
    log.close()


def test_one_object_a_step_in_strict_json(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(0, {"rollout/reward": 0.5, "sync/bytes": 12, "n": np.int64(3), "f": np.float32(0.25), "on": True})
    log.close()
    (line,) = path.read_text().splitlines()
    record = {"step": 0, "rollout/reward": 0.5, "sync/bytes": 12, "n": 3.0, "f": 0.25, "on": 1.0}
    assert json.loads(line) == record == read_metrics(path)[0]


@given(st.dictionaries(st.text(min_size=1), st.floats() | st.integers(-(2**40), 2**40), max_size=6))
def test_numbers_come_back_exactly_and_what_json_has_not_is_null_and_named(
    tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, float]
):
    metrics.pop("step", None)
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(3, metrics)
    log.close()
    assert not any(word in path.read_text().split('"non_finite"')[0] for word in (": NaN", ": Infinity", ": -Infinity"))
    (record,) = read_metrics(path)
    names = record.pop("non_finite", {})
    assert record.pop("step") == 3
    for name, value in metrics.items():
        if np.isfinite(value):
            assert record[name] == value and name not in names
        else:
            assert record[name] is None and names[name] == str(value)


def test_sinks_get_every_step_and_are_closed(tmp_path: Path):
    sink = Collector()
    log = MetricsLog(tmp_path / "metrics.jsonl", sinks=[sink])
    log.write(0, {"a": float("inf")})
    assert sink.seen == [(0, {"a": float("inf")})] and not sink.closed
    log.close()
    assert sink.closed


def test_every_sink_is_closed_when_one_raises(tmp_path: Path):
    class Broken(Collector):
        def close(self) -> None:
            raise OSError("no space left")

    last = Collector()
    log = MetricsLog(tmp_path / "metrics.jsonl", sinks=[last, Broken(), Collector()])
    with pytest.raises(OSError, match="no space"):
        log.close()
    assert last.closed


@given(total=st.integers(0, 6), resumed=st.integers(0, 7))
def test_a_resumed_run_takes_back_the_steps_it_will_do_again(
    tmp_path_factory: pytest.TempPathFactory, total: int, resumed: int
):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    write_steps(path, range(total))
    write_steps(path, range(resumed, resumed + 2), value=100)
    records = [(record["step"], record["rollout/reward"]) for record in read_metrics(path)]
    kept = [(step, float(step)) for step in range(min(total, resumed))]
    assert records == [*kept, (resumed, 100.0 + resumed), (resumed + 1, 101.0 + resumed)]


def test_a_record_that_was_cut_short_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(3))
    path.write_bytes(path.read_bytes()[:-5])
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    write_steps(path, range(5, 6))
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 5]


@pytest.mark.parametrize("line", ["hello", "[1]", '{"reward": 1}', '{"step": "x"}', "{"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, line: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 2"):
        MetricsLog(path, start_step=5)
    assert path.read_bytes() == before


def test_what_was_written_survives_a_kill(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from miles_core.observe import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(3): log.write(step, {'a': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]
