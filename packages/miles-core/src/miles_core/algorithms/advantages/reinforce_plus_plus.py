"""REINFORCE++."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs, Doubles
from miles_core.algorithms.advantages.shapes import scan_back, whiten
from miles_core.types import Floats


def reinforce_plus_plus(inputs: AdvantageInputs, *, gamma: float = 1.0) -> Floats:
    """Returns to go, whitened over all trained tokens of the step.

        G_t = sum over s >= t of gamma^(s - t) * r_s,    A_t = (G_t - mean(G)) / sqrt(var(G) + 1e-8)

    The paper takes k1's KL from the reward of each token: `[algorithm.kl] estimator = "k1", place = "reward"`.

    Source: Hu et al. 2025 (arXiv:2501.03262), section 3.

    Args:
        inputs: rewards of samples and tokens.
        gamma: discount per trained token, in [0, 1].

    Returns:
        Advantages, float32 [T].
    """

    def step(following: Doubles, reward: Doubles) -> tuple[Doubles, Doubles]:
        to_go = reward + gamma * following
        return to_go, to_go

    returns = scan_back(inputs, inputs.rewards_by_token(), step=step)
    return whiten(returns, inputs.loss_mask).astype(np.float32)
