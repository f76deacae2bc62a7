"""GSPO: the ratio of whole sequences."""

from dataclasses import dataclass

import torch

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class GSPO:
    """Group sequence policy optimisation: PPO's clip on the length-normalised ratio of the whole sample.

    With s_i = exp(mean of logprobs - old_logprobs over the trained tokens of sample i), per token:

        loss = -min(s_i * A, clip(s_i, 1 - clip_low, 1 + clip_high) * A)

    `by_token` is GSPO-token: s_i counts as a constant and the gradient goes through the token's own log probability,

        s_it = sg(s_i) * exp(logprobs - sg(logprobs))

    which has the same values. Where all tokens of a sample have one advantage and one weight, the gradients are the
    same too; with advantages of their own for tokens, only GSPO-token moves each token by its own.

    Source: Zheng et al. 2025 (arXiv:2507.18071), eq. 5 to 7, 13 and 14; bounds of section 5.1.

    Attributes:
        clip_low: how far below 1 the ratio may count; in (0, 1]. Orders of magnitude below PPO's.
        clip_high: how far above 1; > 0.
        by_token: GSPO-token.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    by_token: bool = False

    def __post_init__(self) -> None:
        """Refuse bounds that would switch the clip off or turn it around."""
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be in (0, 1]: a ratio is bounded below by 1 - clip_low")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high={self.clip_high} must be > 0: a ratio is bounded above by 1 + clip_high")

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metrics `clip_fraction_low`, `clip_fraction_high`, `ratio` [T]."""
        log_ratio = inputs.sample_mean(inputs.log_ratio())
        if self.by_token:
            logprobs = inputs.masked(inputs.logprobs)
            log_ratio = log_ratio.detach() + logprobs - logprobs.detach()
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        advantages = inputs.masked(inputs.advantages)
        counted = ratio.detach()
        return -torch.minimum(ratio * advantages, clipped * advantages), {
            "clip_fraction_low": ((counted < 1 - self.clip_low) & (advantages < 0)).float(),
            "clip_fraction_high": ((counted > 1 + self.clip_high) & (advantages > 0)).float(),
            "ratio": counted,
        }
