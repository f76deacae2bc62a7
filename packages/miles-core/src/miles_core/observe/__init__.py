"""What a run leaves behind and shows: metrics, samples, times, a live table."""

from miles_core.observe.console import Console
from miles_core.observe.metrics import MetricsLog, Sink, read_metrics
from miles_core.observe.plot import plot_rewards
from miles_core.observe.samples import read_samples, write_samples
from miles_core.observe.sinks import open_sinks
from miles_core.observe.summary import rollout_metrics
from miles_core.observe.timing import PhaseClock, Span
from miles_core.observe.trace import TraceFile

__all__ = [  # noqa: RUF022 (grouped by subject)
    # metrics
    "MetricsLog", "Sink", "open_sinks", "plot_rewards", "read_metrics", "rollout_metrics",
    # samples
    "read_samples", "write_samples",
    # times
    "PhaseClock", "Span", "TraceFile",
    # terminal
    "Console",
]  # fmt: skip
