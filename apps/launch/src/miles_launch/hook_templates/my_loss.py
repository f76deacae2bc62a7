"""The loss of each token.

Save as my_loss.py, and say in the recipe

    [algorithm]
    loss = { name = "my_loss:WeighedGradient", bound = 2.0 }
"""

from dataclasses import dataclass

import torch

from miles_core.algorithms.losses import LossInputs, Scored


@dataclass(frozen=True)
class WeighedGradient:
    """REINFORCE with a bounded importance weight. Parameters of the recipe are the fields; a function would do as well.

    A loss that reads optional columns names them: `needs = frozenset({"ref_logprobs"})`.
    """

    bound: float = 2.0

    def __call__(self, inputs: LossInputs) -> Scored:
        """Return the loss of each token [T] with gradient, and metrics per token. Nothing is summed here."""
        weight = torch.exp(inputs.log_ratio().detach()).clamp(max=self.bound)
        loss = -weight * inputs.masked(inputs.advantages) * inputs.masked(inputs.logprobs)
        return loss, {"weight": weight}
