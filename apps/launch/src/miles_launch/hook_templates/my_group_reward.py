"""The rewards of all samples of a prompt together.

Save as my_group_reward.py, and say in the recipe

    [hooks]
    group_reward = "my_group_reward:rank"
    [reward]
    isolate = false
"""

from collections.abc import Sequence

from miles_core import Prompt, Sample


def rank(prompt: Prompt, samples: Sequence[Sample]) -> list[float]:
    """1 for the shortest response of the group, 0 for the longest, in between by rank."""
    lengths = [len(sample.text) for sample in samples]
    last = max(1, len(samples) - 1)
    return [1 - sum(other < length for other in lengths) / last for length in lengths]
