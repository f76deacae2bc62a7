"""SAPO: a soft gate in place of the clip."""

from dataclasses import dataclass

import torch

from miles_core.algorithms.losses.inputs import LossInputs, Scored


@dataclass(frozen=True, slots=True)
class SAPO:
    """Soft adaptive policy optimisation: the gradient fades with the distance of the ratio from 1, and never stops.

    With r = exp(logprobs - old_logprobs), advantage A, and tau = tau_positive where A > 0, else tau_negative:

        loss = -(4 / tau) * sigmoid(tau * (r - 1)) * A

    At r = 1 the gradient is that of REINFORCE.

    Source: Gao et al. 2025 (arXiv:2511.20347), eq. 5 and 6.

    Attributes:
        tau_positive: how fast the gate closes for A > 0; > 0.
        tau_negative: and for A <= 0; above tau_positive, since pushing tokens down pushes many others up.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        """Refuse temperatures without meaning."""
        for name, value in (("tau_positive", self.tau_positive), ("tau_negative", self.tau_negative)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be > 0: it divides")

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return per-token losses [T] and the metrics `gate`, 1 at r = 1 and less elsewhere, and `ratio` [T]."""
        ratio = torch.exp(inputs.log_ratio())
        advantages = inputs.masked(inputs.advantages)
        tau = torch.full_like(advantages, self.tau_negative).masked_fill(advantages > 0, self.tau_positive)
        open_by = torch.sigmoid(tau * (ratio - 1))
        gate = (4 * open_by * (1 - open_by)).detach()  # what is left of the gradient by r
        return -4 / tau * open_by * advantages, {"gate": gate, "ratio": ratio.detach()}
