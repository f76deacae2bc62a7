"""Numbers of one's own for each step.

Save as my_metrics.py, and say in the recipe

    [hooks]
    metrics = "my_metrics:words"
"""

from collections.abc import Mapping, Sequence

from miles_core import Group


def words(groups: Sequence[Group]) -> Mapping[str, float]:
    """Mean words of a response, under a name with a slash."""
    counts = [len(sample.text.split()) for group in groups for sample in group.samples]
    return {"mine/words": sum(counts) / max(1, len(counts))}
