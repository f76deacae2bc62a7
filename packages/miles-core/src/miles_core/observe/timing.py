"""Where the time of a step goes: named phases, nested as the code nests them.

    clock = PhaseClock()
    with clock.phase("train"):
        with clock.phase("logprobs"): ...
    clock.lap()

gives {"perf/time/train": 1.5, "perf/time/train/logprobs": 0.5, "perf/time/rest": 0.1, "perf/time/step": 1.6}.

A lap ends where the next one begins, so the steps add up to the run. The outermost phases and the rest add up to the
step, as long as no two of them run at the same time; the rest is the time in which none was open.
"""

import contextvars
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """One phase that is over.

    Attributes:
        name: of the phase, below its parents: "train/logprobs".
        start_ns: wall clock at its start, ns since the Unix epoch.
        duration_ns: how long it took, ns.
    """

    name: str
    start_ns: int
    duration_ns: int


class PhaseClock:
    """Adds up the seconds of each phase from lap to lap. Tasks of one event loop may have phases open at once."""

    def __init__(self, on_span: Callable[[Span], None] | None = None):
        """Start the first lap.

        Args:
            on_span: called with each phase when it is over, e.g. `TraceFile.add`.
        """
        self._on_span = on_span
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()  # spans must not jump when the wall clock is set
        self._parent = contextvars.ContextVar("phase", default="")
        self._open: dict[object, tuple[str, int]] = {}  # of each phase the name and where it, or the lap, began
        self._lap_ns = self._idle_ns = time.perf_counter_ns()
        self._spent: dict[str, int] = {}
        self._rest = 0

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the body's time under `name`, below the phase that this one is called in."""
        parent = self._parent.get()
        path = f"{parent}/{name}" if parent else name
        token, key = self._parent.set(path), object()
        start = time.perf_counter_ns()
        if not self._open:
            self._rest += start - self._idle_ns
        self._open[key] = (path, start)
        try:
            yield
        finally:
            stop = time.perf_counter_ns()
            self._parent.reset(token)
            self._spend(*self._open.pop(key), stop)
            if not self._open:
                self._idle_ns = stop
            if self._on_span:
                self._on_span(Span(path, self._epoch_ns + start, stop - start))

    def lap(self) -> dict[str, float]:
        """End the lap and start the next.

        Returns:
            Seconds: `perf/time/<phase>` of each phase, `perf/time/rest` and `perf/time/step`. A phase that is still
            open counts in each lap with the time it had there.
        """
        now = time.perf_counter_ns()
        for key, (path, start) in self._open.items():
            self._spend(path, start, now)
            self._open[key] = (path, now)
        if not self._open:
            self._rest += now - self._idle_ns
            self._idle_ns = now
        spent = self._spent | {"rest": self._rest, "step": now - self._lap_ns}
        self._lap_ns, self._spent, self._rest = now, {}, 0
        return {f"perf/time/{name}": ns / 1e9 for name, ns in spent.items()}

    def _spend(self, path: str, start: int, stop: int) -> None:
        self._spent[path] = self._spent.get(path, 0) + stop - start
