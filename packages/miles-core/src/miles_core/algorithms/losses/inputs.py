"""What a loss sees of a micro-batch, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Scored = tuple[Tensor, Mapping[str, Tensor]]
"""A number per token [T] with gradient, and named metrics per token [T] without."""


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Columns of one micro-batch: T tokens of whole samples, however they were packed or split over ranks.

    Two samples of three and two tokens, of each the last one trained:

        sample_index [0, 0, 0, 1, 1]    loss_mask [F, F, T, F, T]

    Values outside loss_mask are anything, NaN included: read columns through `masked` or the sums over samples.

    Attributes:
        logprobs: log probability under the current weights, float32 [T], with gradient.
        old_logprobs: the same tokens under the weights before the step's first update, float32 [T].
        rollout_logprobs: as the engine reported them, float32 [T].
        advantages: float32 [T].
        loss_mask: bool [T]; values outside it are ignored.
        sample_index: which sample of the micro-batch a token belongs to, int64 [T], below T.
        entropy: of the distribution each token was drawn from, float32 [T], with gradient. The attributes from here on
            are None unless the loss `needs` them.
        ref_logprobs: the same tokens under a frozen reference, float32 [T].
        teacher_logprobs: the same tokens under a teacher, float32 [T].
        values: of a critic, float32 [T], with gradient.
        old_values: of the critic before the step's first update, float32 [T].
        returns: what the critic should have said, float32 [T].
        staleness: how many updates old the weights were that sampled the token, float32 [T].
        group_index: which group of the micro-batch a token belongs to, int64 [T], below T. Where it is there, groups
            are whole.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    sample_index: Tensor
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    values: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    staleness: Tensor | None = None
    group_index: Tensor | None = None

    def masked(self, column: Tensor) -> Tensor:
        """`column` [T] with 0 outside loss_mask, where no gradient goes either."""
        return column.masked_fill(~self.loss_mask, 0.0)

    def column(self, name: str) -> Tensor:
        """An optional column, masked.

        Raises:
            ValueError: it is not there.
        """
        column: Tensor | None = getattr(self, name)
        if column is None:
            raise ValueError(
                f'inputs.{name} is None: a loss that reads it must say so, needs = frozenset({{"{name}"}})'
            )
        return self.masked(column)

    def log_ratio(self) -> Tensor:
        """The log of the ratio, logprobs - old_logprobs, [T] with gradient, 0 outside loss_mask."""
        return self.masked(self.logprobs - self.old_logprobs)

    def sample_sum(self, column: Tensor) -> Tensor:
        """At each token the sum of `column` over the trained tokens of its sample, [T]."""
        sums = column.new_zeros(column.shape).index_add(0, self.sample_index, self.masked(column))
        return sums[self.sample_index]  # as many places as tokens: their number needs no wait for a GPU

    def sample_mean(self, column: Tensor) -> Tensor:
        """At each token the mean of `column` over the trained tokens of its sample, [T]; 0 where it has none."""
        return self.sample_sum(column) / self.sample_sum(torch.ones_like(column)).clamp(min=1)


class Loss(Protocol):
    """Maps the columns of a micro-batch to per-token losses.

    A loss that reads optional columns of `LossInputs` names them in an attribute: `needs = frozenset({"ref_logprobs"})`
    of a class, or of a function. They cost something to have: a run without the attribute goes without them.
    """

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return the loss of each token, [T] with gradient, and named per-token metrics, [T] without."""
        ...


class Correction(Protocol):
    """Weighs each token for what sampling engine and trainer disagree about."""

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return the factor of each token's loss, [T] without gradient, and named per-token metrics, [T]."""
        ...
