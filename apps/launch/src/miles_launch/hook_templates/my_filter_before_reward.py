"""Which groups are worth judging.

Save as my_filter_before_reward.py, and say in the recipe

    [hooks]
    filter_before_reward = "my_filter_before_reward:not_all_cut"
"""

from miles_core import Group


def not_all_cut(group: Group) -> str | None:
    """Drop a group whose samples were all cut at the token limit. Rewards are not there yet."""
    if all(sample.finish_reason == "length" for sample in group.samples):
        return "all cut"  # counted under rollout/dropped/all cut
    return None
