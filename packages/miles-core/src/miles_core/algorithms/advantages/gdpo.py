"""GDPO: several rewards, each normalised by itself."""

from collections.abc import Mapping

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.algorithms.advantages.shapes import EPS, group_mean, group_std
from miles_core.types import Floats


def gdpo(inputs: AdvantageInputs, *, weights: Mapping[str, float] | None = None) -> Floats:
    """Normalise each part of the reward in its group, sum them with weights, normalise the sum over the step.

        A_k = (r_k - mean(r_k)) / (std(r_k) + EPS)    over the group, for each part k
        S = sum over k of w_k * A_k
        A = (S - mean(S)) / (std(S) + EPS)            over the step

    Added up first and normalised then, as GRPO does, rewards of different scale or rarity drown each other.

    Source: GDPO, NVIDIA 2026 (arXiv:2601.05242), eq. 4 to 7.

    Args:
        inputs: with the named parts of the rewards.
        weights: of the parts that count; None counts all of them equally.

    Returns:
        Advantages, float32 [N].

    Raises:
        ValueError: a weight names a part that there is not, or there are no parts.
    """
    parts = inputs.reward_parts
    weights = dict.fromkeys(parts, 1.0) if weights is None else weights
    if missing := sorted(set(weights) - set(parts)) or not weights:
        raise ValueError(
            f"gdpo needs named parts of the reward: it has {sorted(parts)}, and {missing if weights else 'none'} is "
            'missing. Return {"reward": total, "part": value, ...} from the reward.'
        )
    total = np.zeros(len(inputs.rewards))
    for name, weight in weights.items():
        part = parts[name].astype(np.float64)
        centred = part - group_mean(part, inputs.group_index)
        total += weight * centred / (group_std(part, inputs.group_index) + EPS)
    deviation = total.std(ddof=1) if len(total) > 1 else 0.0
    return ((total - total.mean()) / (deviation + EPS)).astype(np.float32)
