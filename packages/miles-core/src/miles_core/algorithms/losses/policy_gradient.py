"""The plain policy gradient."""

from miles_core.algorithms.losses.inputs import LossInputs, Scored


def policy_gradient(inputs: LossInputs) -> Scored:
    """REINFORCE's loss = -A * logprobs per token, for samples of the current weights: no ratio, no clip.

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
    """
    return -inputs.masked(inputs.advantages) * inputs.masked(inputs.logprobs), {}
