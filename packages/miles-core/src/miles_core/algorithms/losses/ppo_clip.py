"""PPO's clipped surrogate."""

from dataclasses import dataclass

import torch

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class PPOClip:
    """The clipped surrogate of PPO with asymmetric bounds and, if asked for, the dual clip.

    With r = exp(logprobs - old_logprobs) and advantage A, per token:

        loss = -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)
        loss = min(loss, -dual_clip * A)    where A < 0, with dual_clip

    Sources: Schulman et al. 2017 (arXiv:1707.06347), eq. 7; asymmetric bounds: DAPO (arXiv:2503.14476), eq. 10; dual
    clip: Ye et al. 2019 (arXiv:1912.09729), eq. 5.

    Attributes:
        clip_low: how far below 1 the ratio may count; in (0, 1].
        clip_high: how far above 1; > 0.
        dual_clip: the largest ratio that counts where A < 0; > 1, usually 3. None bounds nothing there.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Refuse bounds that would switch the clip off or turn it around."""
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must be in (0, 1]: a ratio is bounded below by 1 - clip_low")
        if not self.clip_high > 0:
            raise ValueError(f"clip_high={self.clip_high} must be > 0: a ratio is bounded above by 1 + clip_high")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be > 1: it bounds ratios above 1 where A < 0")

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metrics `clip_fraction_low`, `clip_fraction_high`, `ratio` [T].

        With the dual clip also `clip_fraction_dual`, the tokens that it stops.
        """
        ratio = torch.exp(inputs.log_ratio())
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        advantages = inputs.masked(inputs.advantages)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        counted = ratio.detach()
        metrics = {
            "clip_fraction_low": ((counted < 1 - self.clip_low) & (advantages < 0)).float(),
            "clip_fraction_high": ((counted > 1 + self.clip_high) & (advantages > 0)).float(),
            "ratio": counted,
        }
        if self.dual_clip is not None:
            stopped = (counted > self.dual_clip) & (advantages < 0)
            loss = torch.where(stopped, -self.dual_clip * advantages, loss)
            metrics["clip_fraction_dual"] = stopped.float()
        return loss, metrics
