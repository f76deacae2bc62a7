"""Policy losses in torch: per-token values, never reduced here.

A loss sees one micro-batch as flat columns and returns one number per token; the trainer multiplies by the batch's
`loss_weights` (miles_core.batching decides the reduction) and sums. So the same loss is right under packing, any split
into micro-batches, and data parallelism.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

try:
    import torch
    from torch import Tensor
except ImportError as error:
    raise ImportError('miles_core.algorithms.losses needs torch: pip install "miles-core[torch]"') from error


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Columns of one micro-batch, T tokens.

    Attributes:
        logprobs: log probability under the current weights, float32 [T], with gradient.
        old_logprobs: the same tokens under the weights before the step's first update, float32 [T].
        rollout_logprobs: as the engine reported them, float32 [T].
        advantages: float32 [T].
        loss_mask: bool [T]; values outside it are ignored.
        entropy: of the distribution each token was drawn from, float32 [T], with gradient; None if not asked for.
        sample_index: which sample of the micro-batch a token belongs to, int64 [T].
    """

    logprobs: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    entropy: Tensor | None
    sample_index: Tensor


class Loss(Protocol):
    """Maps the columns of a micro-batch to per-token losses."""

    @property
    def needs_entropy(self) -> bool:
        """Whether `inputs.entropy` must be there."""
        ...

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of each token, [T] with gradient, and named per-token metrics, [T] without."""
        ...


@dataclass(frozen=True, slots=True)
class PPOClip:
    """The clipped surrogate of PPO with asymmetric bounds, minus an entropy bonus.

    With r = exp(logprobs - old_logprobs) and advantage A, per token:

        loss = -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A) - entropy_coef * entropy

    Sources: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; asymmetric bounds: DAPO (arXiv:2503.14476), eq. 10.

    Attributes:
        clip_low: how far below 1 the ratio may count; in (0, 1].
        clip_high: how far above 1; > 0.
        entropy_coef: weight of the entropy bonus in nats; 0 turns it off and saves its computation.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        """Refuse bounds that would switch the clip off or turn it around."""
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be in (0, 1]: a ratio is bounded below by 1 - clip_low")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high={self.clip_high} must be > 0: a ratio is bounded above by 1 + clip_high")

    @property
    def needs_entropy(self) -> bool:
        """Whether the bonus is on."""
        return self.entropy_coef != 0

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return per-token losses [T] and the metrics `clip_fraction_low`, `clip_fraction_high`, `ratio` [T].

        Raises:
            ValueError: the entropy bonus is on and the inputs have no entropy.
        """
        ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        advantages = inputs.advantages
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        if self.needs_entropy:
            if inputs.entropy is None:
                raise ValueError(f"entropy_coef={self.entropy_coef} needs inputs.entropy, which is None")
            loss = loss - self.entropy_coef * inputs.entropy
        ratio = ratio.detach()
        low = (ratio < 1 - self.clip_low) & (advantages < 0)
        high = (ratio > 1 + self.clip_high) & (advantages > 0)
        return loss, {"clip_fraction_low": low.float(), "clip_fraction_high": high.float(), "ratio": ratio}
