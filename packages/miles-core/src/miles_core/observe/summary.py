"""What the samples of a step say about the policy, as metrics."""

from collections.abc import Iterable, Sequence

import numpy as np

from miles_core.types import Group, Sample


def rollout_metrics(groups: Sequence[Group], weight_version: int) -> dict[str, float]:
    """Metrics of the groups that a step trains on.

    Args:
        groups: judged groups.
        weight_version: the trainer's current version, from which staleness counts.

    Returns:
        Under `rollout/`: `reward` and `reward_std` over all samples; `<part>`, the mean of each part of the reward over
        the samples that have it; `response_len` and `response_len_max` in tokens; `truncated`, the share of samples cut
        at the token limit; `zero_variance_groups`, whose rewards are all equal, so that they teach GRPO nothing;
        `staleness_mean` and `staleness_max` in updates; `num_groups` and `num_samples`. Only the last two when there
        are no samples.
    """
    samples = [sample for group in groups for sample in group.samples]
    counts = {"rollout/num_groups": len(groups), "rollout/num_samples": len(samples)}
    if not samples:
        return dict(counts)
    rewards = np.asarray([sample.reward for sample in samples])
    lengths = np.asarray([sample.response_len for sample in samples])
    staleness = weight_version - np.asarray([sample.oldest_version for sample in samples])
    return _reward_parts(samples) | {
        "rollout/reward": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std()),
        "rollout/response_len": float(lengths.mean()),
        "rollout/response_len_max": int(lengths.max()),
        "rollout/truncated": float(np.mean([sample.finish_reason == "length" for sample in samples])),
        "rollout/zero_variance_groups": sum(bool(np.ptp(group.rewards) == 0) for group in groups),
        "rollout/staleness_mean": float(staleness.mean()),
        "rollout/staleness_max": int(staleness.max()),
        **counts,
    }


def _reward_parts(samples: Iterable[Sample]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.reward_parts.items():
            parts.setdefault(f"rollout/{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in parts.items()}
