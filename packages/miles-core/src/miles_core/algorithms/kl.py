"""Estimators of KL(policy || reference) from the log probabilities of sampled tokens.

Each is a function of (logprobs, ref_logprobs), for arrays of numpy (in rewards) and tensors of torch (in losses) alike.
With d = ref_logprobs - logprobs, for tokens that the policy sampled:

    estimator  value              value unbiased   gradient, as a loss, in expectation over the policy's samples
    k1         -d                 yes              0: no use in a loss
    k2         d^2 / 2            no               that of the KL
    k3         exp(d) - d - 1     yes, never < 0   that of KL(reference || policy)

Source: Schulman 2020, http://joschu.net/blog/kl-approx.html; gradients: Tang and Munos 2025 (arXiv:2506.09477).
"""

from typing import Any, Protocol

import numpy as np


class KLEstimator(Protocol):
    """Estimate KL(policy || reference) at each token: of tensors in a loss, of numpy arrays in rewards."""

    def __call__(self, logprobs: Any, ref_logprobs: Any) -> Any:
        """Take log probabilities of sampled tokens, [T] each; return the estimates [T]."""
        ...


def k1(logprobs: Any, ref_logprobs: Any) -> Any:
    """k1 = logprobs - ref_logprobs, [T]: unbiased, of high variance, often negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Any, ref_logprobs: Any) -> Any:
    """k2 = (logprobs - ref_logprobs)^2 / 2, [T]: biased, of low variance; its gradient is that of the KL."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Any, ref_logprobs: Any) -> Any:
    """k3 = exp(d) - d - 1 with d = ref_logprobs - logprobs, [T]: unbiased, of low variance, never negative."""
    d: Any = ref_logprobs - logprobs
    # expm1: of a small d, exp(d) - 1 would keep no digit that d^2 / 2 needs.
    return (d.expm1() if hasattr(d, "expm1") else np.expm1(d)) - d
