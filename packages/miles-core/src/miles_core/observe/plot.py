"""The reward curve of a run as a picture; needs `miles-core[plot]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_core.observe._extras import require

_CURVES = {"rollout/reward": "reward", "rollout/exact": "exact"}


def plot_rewards(records: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draw the mean reward over the steps, and the share of exact answers where there is one.

    Args:
        records: from `read_metrics`.
        path: the PNG to write.
        title: above the curve.

    Returns:
        `path`.

    Raises:
        ImportError: the extra is not installed.
    """
    figure = require("matplotlib.figure", "plot").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in _CURVES.items():
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points or name == "rollout/reward":
            steps, values = [step for step, _ in points], [value for _, value in points]
            axes.plot(steps, values, label=label, marker="." if len(points) < 50 else None)
    axes.set(title=title, xlabel="step", ylabel="mean over the samples of a step")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)  # without pyplot: no window system, no global state
    return path
