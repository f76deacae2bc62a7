"""The main job as a child process, for tests that start, stop and kill it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
# A step of 8 prompts × 8 samples: enough to see that everything works, and a third of a second long.
SMALL = ("rollout.prompts_per_step=8", "rollout.group_size=8", "cluster.dashboard_port=0", "observe.samples_every=0")
EXIT_DEADLINE_S = 60  # within which a run must end once one of its processes was killed
START_DEADLINE_S = 240  # two cores, shared with other tests


class Job:
    """`miles run` in `folder`, with everything it started."""

    def __init__(self, folder: Path, *arguments: str, settings: tuple[str, ...] = (), recipe: Path = QUICKSTART):
        self.folder = folder
        overrides = [item for setting in (*SMALL, *settings) for item in ("--set", setting)]
        self.output = folder / f"output-{time.time_ns()}.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "miles_launch", "run", str(recipe), *overrides, *arguments],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment() | {"MILES_TEST_JOB": str(self.output)},
            )

    @property
    def run(self) -> Path:
        """Folder of the only run there is."""
        return self.folder / "runs" / "quickstart"

    def metrics(self) -> list[dict[str, Any]]:
        file = self.run / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def text(self) -> str:
        return self.output.read_text()

    def wait_until(self, condition: Callable[[], object], deadline_s: float = START_DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, f"the run ended early with {self.process.returncode}:\n{self.text()}"
            assert time.monotonic() < deadline, f"waited {deadline_s} s:\n{self.text()}"
            time.sleep(0.05)

    def wait(self, deadline_s: float = START_DEADLINE_S) -> int:
        """Exit code; the run must end by itself."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {deadline_s} s:\n{self.text()}") from None

    def processes(self) -> list[psutil.Process]:
        """Everything that the driver started, itself not included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MILES_TEST_JOB") == str(self.output) and process.pid != self.process.pid:
                    found.append(process)
        return found

    def find(self, kind: str) -> psutil.Process:
        """The process of this kind: a role ("trainer", by the log that it writes) or a program's name."""
        return next(process for process in self.processes() if kind in _names(process))

    def end(self) -> None:
        """Kill whatever is left, so that a failed test leaves nothing to the next."""
        for process in [*self.processes(), psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def interrupt(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@contextlib.contextmanager
def job(folder: Path, *arguments: str, settings: tuple[str, ...] = (), recipe: Path = QUICKSTART) -> Iterator[Job]:
    """A run that is gone when the block is left; it must have left no process behind if the block succeeds."""
    started = Job(folder, *arguments, settings=settings, recipe=recipe)
    try:
        yield started
        assert no_process_left(started), f"left behind: {[p.cmdline() for p in started.processes()]}"
    finally:
        started.end()


def no_process_left(started: Job, deadline_s: float = 15) -> bool:
    deadline = time.monotonic() + deadline_s
    while started.processes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _environment() -> dict[str, str]:
    dropped = {"PYTHONDONTWRITEBYTECODE"}
    return {key: value for key, value in os.environ.items() if key not in dropped}  # it makes imports slow


def _names(process: psutil.Process) -> set[str]:
    command = process.cmdline()
    names = {process.name(), *(Path(part).name for part in command[:1]), *command[2:3]}  # python -m THIS
    with contextlib.suppress(psutil.Error):
        names |= {Path(file.path).stem.rpartition("-")[0] for file in process.open_files() if "/logs/" in file.path}
    return names
