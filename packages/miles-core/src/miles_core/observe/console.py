"""What a person sees while a run works: a live table in a terminal, plain lines elsewhere."""

import math
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

import rich.console
from rich import box
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_SHOWN_STEPS = 12
_COLUMNS = {  # heading: metric, format
    "reward": ("rollout/reward", ".3f"),
    "length": ("rollout/response_len", ".1f"),
    "logprob gap": ("train/logprob_gap", ".1e"),
    "tokens/s": ("perf/tokens_per_s", ",.0f"),
    "seconds": ("perf/time/step", ".2f"),
}


class Console:
    """A `Sink` that shows the last steps, progress and time left. A context manager: leaving it restores the terminal.

    with Console(total_steps=100) as console:
        console.banner("rewards are shuffled: this run must not learn")
        console.status("starting engines")
        console.write(0, {"rollout/reward": 0.1})
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: rich.console.Console | None = None):
        """Prepare; nothing is shown yet.

        Args:
            total_steps: of the whole run.
            start_step: where a resumed run begins.
            console: rich's console to draw on; standard output by default.
        """
        self._console = console or rich.console.Console()
        self._rows: list[list[str]] = []
        self._total_steps = total_steps
        self._seconds: deque[float] = deque(maxlen=_SHOWN_STEPS)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}  {task.fields[status]}", markup=False),
            console=self._console,
        )
        can_redraw = self._console.is_terminal and not self._console.is_dumb_terminal
        self._task = self._progress.add_task("step", total=total_steps, completed=start_step, status="", left="")
        self._live = Live(console=self._console, refresh_per_second=4) if can_redraw else None

    def __enter__(self) -> Self:
        """Start drawing."""
        if self._live:
            self._live.start()
            self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self.close()

    def banner(self, text: str) -> None:
        """A line that must be seen, e.g. that a control is on."""
        self._console.print(Text(f"!!! {text}", style="bold yellow"), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line for the record."""
        self._console.print(Text(text), soft_wrap=True)

    def status(self, text: str) -> None:
        """What the run is doing now: beside the bar in a terminal, nowhere else."""
        self._progress.update(self._task, status=text)
        self._draw()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step that is done."""
        cells = [_cell(metrics, name, form) for name, form in _COLUMNS.values()]
        phases = _phases(metrics)
        left = self._time_left(step, metrics)
        self._rows = [*self._rows[1 - _SHOWN_STEPS :], [str(step), *cells, phases]]
        self._progress.update(self._task, completed=step + 1, left=left)
        if self._live:
            self._draw()
            return
        values = [f"{heading} {cell}" for heading, cell in zip(_COLUMNS, cells, strict=True) if cell]
        parts = [f"step {step} of {self._total_steps}", *values, f"({phases})" if phases else "", left]
        self.note("  ".join(part for part in parts if part))

    def close(self) -> None:
        """Stop drawing; the last table stays."""
        if self._live:
            self._live.stop()

    def _time_left(self, step: int, metrics: Mapping[str, float]) -> str:
        self._seconds.append(metrics.get("perf/time/step", float("nan")))
        seconds = (self._total_steps - step - 1) * sum(self._seconds) / len(self._seconds)
        return f"{timedelta(seconds=round(seconds))} left" if math.isfinite(seconds) else ""

    def _draw(self) -> None:
        if self._live:
            self._live.update(Group(self._table(), self._progress.get_renderable()))

    def _table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("step", *_COLUMNS):
            table.add_column(heading, justify="right", no_wrap=True, min_width=max(len(heading), 5))
        table.add_column("phases, s", no_wrap=True)  # the one that gives way in a narrow terminal
        for row in self._rows:
            table.add_row(*row)
        return table


def _cell(metrics: Mapping[str, float], name: str, form: str) -> str:
    return format(metrics[name], form) if name in metrics else ""


def _phases(metrics: Mapping[str, float]) -> str:
    """The outermost phases, in the order they came: "generate 0.61, train 1.10"."""
    prefix = "perf/time/"
    times = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    return ", ".join(f"{name} {value:.2f}" for name, value in times.items() if "/" not in name and name != "step")
