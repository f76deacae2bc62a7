"""DPO: of two answers the better one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class DPO:
    """Direct preference optimisation over pairs: a group's chosen sample (advantage > 0) and rejected one (< 0).

    With m = sum over the chosen sample's trained tokens of logprobs - ref_logprobs, minus that of the rejected one's:

        loss = -log sigmoid(beta * m)

    Every token of both samples has the loss of its pair: with reduction "sample_mean" the batch's loss is the mean over
    pairs. Samples of advantage 0 take no part. `miles_core.algorithms.advantages.preference` gives such advantages.

    Source: Rafailov et al. 2023 (arXiv:2305.18290), eq. 7.

    Attributes:
        beta: strength of the tie to the reference; > 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs", "group_index"})

    beta: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a beta that turns preferences around."""
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be > 0: below, the rejected sample would be preferred")

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metrics `dpo_margin` (beta * m) and `dpo_accuracy` (m > 0) [T].

        Raises:
            ValueError: a group with trained tokens has no chosen or no rejected sample here, or several.
        """
        log_ratio = inputs.masked(inputs.logprobs) - inputs.column("ref_logprobs")
        sign = inputs.masked(inputs.advantages).sign()
        if inputs.group_index is None:
            raise ValueError("inputs.group_index is None: DPO must know which samples are a pair")
        group = inputs.group_index
        _check_pairs(inputs, sign, group)
        margins = torch.zeros_like(log_ratio).index_add(0, group, sign * log_ratio)
        margin = self.beta * margins[group]
        takes_part = sign != 0
        loss = torch.where(takes_part, -logsigmoid(margin), 0.0)
        told = margin.detach()
        return loss, {"dpo_margin": told, "dpo_accuracy": (told > 0).float()}


def _check_pairs(inputs: LossInputs, sign: torch.Tensor, group: torch.Tensor) -> None:
    # A token's share of its sample: those of a sample add up to 1.
    share = 1 / inputs.sample_sum(torch.ones_like(sign)).clamp(min=1)
    chosen, rejected = (torch.zeros_like(share).index_add(0, group, share * (sign == side)).round() for side in (1, -1))
    wrong = (chosen != rejected) | (chosen > 1)
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ValueError(
            f"a group has {int(chosen[place])} chosen and {int(rejected[place])} rejected samples in this micro-batch: "
            'DPO needs one of each. Use algorithm.advantage = "preference".'
        )
