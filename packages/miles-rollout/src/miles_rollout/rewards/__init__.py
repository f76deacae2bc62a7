"""Judging samples: built-in rewards, and where reward code runs."""

from miles_rollout.rewards.builtin import exact_match, last_integer, position_match, regex_match
from miles_rollout.rewards.judge import InProcessJudge, Judge, Verdict
from miles_rollout.rewards.load import make_group_judge, make_judge
from miles_rollout.rewards.pool import PoolSettings, RewardPool

__all__ = [  # noqa: RUF022 (grouped by subject)
    # where it runs
    "Judge",
    "Verdict",
    "InProcessJudge",
    "RewardPool",
    "PoolSettings",
    "make_judge",
    "make_group_judge",
    # built-in rewards
    "exact_match",
    "last_integer",
    "position_match",
    "regex_match",
]
