"""How far trainer and engine are apart, by token or by sample."""

from typing import Literal

import torch
from torch import Tensor

from miles_core.algorithms.losses.inputs import LossInputs

Level = Literal["token", "sequence", "geometric"]
MAX_LOG = 20.0  # exp(20) = 5e8 is far beyond every bound; sums over long samples would overflow without


def rollout_ratio(inputs: LossInputs, level: Level) -> Tensor:
    """p_trainer / p_engine under the weights before the step's first update, [T] without gradient.

    With d = old_logprobs - rollout_logprobs over the trained tokens:

        "token"      exp(d) of the token itself
        "sequence"   exp(sum of d over the token's sample): the exact importance weight of the sample
        "geometric"  exp(mean of d over the token's sample): the same per token, whatever the length

    d, its sum and its mean count up to +-20.
    """
    d = inputs.masked(inputs.old_logprobs - inputs.rollout_logprobs).detach()
    of_level = {
        "token": lambda: d,
        "sequence": lambda: inputs.sample_sum(d),
        "geometric": lambda: inputs.sample_mean(d),
    }
    return torch.exp(of_level[level]().clamp(-MAX_LOG, MAX_LOG))


def check_bounds(level: str, lower: float, upper: float) -> None:
    """Refuse a level that there is not, and bounds that no ratio, or not that of equal models, can meet."""
    if level not in ("token", "sequence", "geometric"):
        raise ValueError(f"level={level!r} must be one of 'token', 'sequence', 'geometric'")
    if not 0 <= lower <= 1 <= upper:
        raise ValueError(
            f"lower={lower} and upper={upper} must hold 0 <= lower <= 1 <= upper: equal models have ratio 1"
        )
