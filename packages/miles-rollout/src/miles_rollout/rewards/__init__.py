"""Judging samples: built-in rewards, and where reward code runs."""

from miles_rollout.rewards.builtin import exact_match, last_integer, position_match
from miles_rollout.rewards.judge import InProcessJudge, Judge, Verdict

__all__ = [  # noqa: RUF022 (grouped by subject)
    # where it runs
    "Judge",
    "InProcessJudge",
    "Verdict",
    # built-in rewards
    "exact_match",
    "last_integer",
    "position_match",
]
