"""Called in the driver when a step is over.

Save as my_after_step.py, and say in the recipe

    [hooks]
    after_step = { name = "my_after_step:keep_best", path = "best.txt" }
"""

from collections.abc import Sequence
from pathlib import Path

from miles_core import Group, StepReport


def keep_best(report: StepReport, groups: Sequence[Group], *, path: str = "best.txt") -> None:
    """Write down the best response of each step."""
    best = max((sample for group in groups for sample in group.samples), key=lambda sample: sample.reward)
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(f"{report.step}\t{best.reward:g}\t{best.text!r}\n")
