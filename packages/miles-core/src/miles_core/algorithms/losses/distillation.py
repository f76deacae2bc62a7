"""On-policy distillation."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class Distillation:
    """Reverse KL to a teacher, on the policy's own samples.

    With r = exp(logprobs - old_logprobs), per token:

        loss = r * sg(logprobs - teacher_logprobs)

    It is the single-sample estimate of KL(policy || teacher) at the token, and its gradient, r * (logprobs -
    teacher_logprobs) * grad logprobs, is unbiased for that of the KL with the prefix given. Advantages play no part.

    Sources: Agarwal et al. 2023 (arXiv:2306.13649); Gu et al. 2023 (arXiv:2306.08543); Lu and Thinking Machines 2025,
    "On-policy distillation".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"teacher_logprobs"})

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metric `teacher_kl`, logprobs - teacher_logprobs [T]."""
        gap = (inputs.masked(inputs.logprobs) - inputs.column("teacher_logprobs")).detach()
        return torch.exp(inputs.log_ratio()) * gap, {"teacher_kl": gap}
