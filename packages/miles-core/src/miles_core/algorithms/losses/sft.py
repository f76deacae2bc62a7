"""Supervised fine-tuning."""

from miles_core.algorithms.losses.inputs import LossInputs, Scored


def sft(inputs: LossInputs) -> Scored:
    """Negative log likelihood, loss = -logprobs per token of loss_mask; advantages play no part."""
    return -inputs.masked(inputs.logprobs), {}
