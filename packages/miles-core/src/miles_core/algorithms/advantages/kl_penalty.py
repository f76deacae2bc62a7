"""KL to a reference as a part of the reward."""

import numpy as np

from miles_core.algorithms.advantages.inputs import AdvantageInputs
from miles_core.algorithms.kl import KLEstimator


def with_kl_penalty(inputs: AdvantageInputs, estimator: KLEstimator, coef: float) -> AdvantageInputs:
    """Take coef * KL(policy || reference), estimated at each trained token, from that token's reward.

        r_t <- r_t - coef * KL_t

    Any estimator of advantages may follow: those per sample see the sum over the sample's tokens.

    Source: Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, there with k1.

    Args:
        inputs: with rollout_logprobs and ref_logprobs.
        estimator: k1, k2, k3 or one's own.
        coef: >= 0.
    """
    penalty = coef * estimator(inputs.column("rollout_logprobs"), inputs.column("ref_logprobs"))
    before = 0.0 if inputs.token_rewards is None else inputs.token_rewards
    return inputs.replace(token_rewards=np.where(inputs.loss_mask, before - penalty, 0.0))
