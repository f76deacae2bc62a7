"""KL to a reference as a part of the loss."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from miles_core.algorithms.kl import KLEstimator, k2, k3
from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class KLTerm:
    """coef * KL(policy || reference), estimated at each token.

    An estimator's value and its gradient are different questions (see miles_core.algorithms.kl): differentiated as it
    stands, k3 pulls towards the reference with the gradient of another divergence, and k1 not at all. `gradient` says
    which one is taken:

        "own"         of the estimator, as it stands
        "k2"          of k2, whose expectation is that of the KL, under the estimator's value
        "importance"  of r * estimator with r = exp(logprobs - old_logprobs): with k1 or k3 unbiased, also when the
                      samples are of older weights

    Sources: arXiv:2506.09477 ("k2" in place of the naive ones); DeepSeek-V3.2 (arXiv:2512.02556), "unbiased KL
    estimate" (importance).

    Attributes:
        coef: weight in the loss; > 0.
        estimator: k1, k2, k3 or one's own.
        gradient: see above.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs"})

    coef: float
    estimator: KLEstimator = k3
    gradient: Literal["own", "k2", "importance"] = "own"

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return the term per token [T] and the metric `kl`, the estimate [T]."""
        logprobs, reference = inputs.masked(inputs.logprobs), inputs.column("ref_logprobs")
        estimate = self.estimator(logprobs, reference)
        told = {"kl": estimate.detach()}
        if self.gradient == "importance":
            estimate = torch.exp(inputs.log_ratio()) * estimate
        elif self.gradient == "k2":
            carrier = k2(logprobs, reference)
            estimate = estimate.detach() + carrier - carrier.detach()
        return self.coef * estimate, told
