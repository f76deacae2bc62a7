"""Generalised advantage estimation."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs, Doubles, Estimates
from miles_core.algorithms.advantages.shapes import scan_back, whiten
from miles_core.algorithms.needs import needs


@needs("values")
def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 0.95, normalize: bool = True) -> Estimates:
    """Exponentially weighted sum of what surprised the critic.

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    returns_t = A_t + V_t

    over the trained tokens of a sample; after the last one V = 0. Tokens of others between them are passed over:
    V_{t+1} is that of the next trained token. Advantages are then whitened over all trained tokens of the step, returns
    are not.

    Source: Schulman et al. 2015 (arXiv:1506.02438), eq. 16.

    Args:
        inputs: rewards, and values of a critic.
        gamma: discount per trained token, in [0, 1].
        lam: 1 sums rewards to the end (no bias), 0 trusts the critic after one token (little variance).
        normalize: whiten.

    Returns:
        Advantages and returns, float32 [T] each.
    """
    values = inputs.column("values")

    def shift(following: Doubles, value: Doubles) -> tuple[Doubles, Doubles]:
        return following, value

    def step(following: Doubles, delta: Doubles) -> tuple[Doubles, Doubles]:
        advantage = delta + gamma * lam * following
        return advantage, advantage

    surprise = inputs.rewards_by_token() + gamma * scan_back(inputs, values, step=shift) - values
    advantages = scan_back(inputs, surprise, step=step)
    returns = (advantages + values).astype(np.float32)
    if normalize:
        advantages = whiten(advantages, inputs.loss_mask)
    return Estimates(advantages.astype(np.float32), returns)
