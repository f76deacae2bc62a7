"""Which judged groups are trained on.

Save as my_sample_filter.py, and say in the recipe

    [hooks]
    sample_filter = { name = "my_sample_filter:not_too_easy", most = 0.9 }
"""

from miles_core import Group


def not_too_easy(group: Group, *, most: float = 0.9) -> str | None:
    """Drop a group whose mean reward is above `most`."""
    if float(group.rewards.mean()) > most:
        return "too easy"  # counted under rollout/dropped/too easy
    return None
