"""A factor for what engine and trainer disagree about.

Save as my_correction.py, and say in the recipe

    [algorithm]
    corrections = [{ name = "my_correction:leave_out", most = 0.5 }]
"""

from miles_core.algorithms.losses import LossInputs, Scored


def leave_out(inputs: LossInputs, *, most: float = 0.5) -> Scored:
    """0 for tokens whose two log probabilities differ by more than `most`, 1 for the others."""
    gap = inputs.masked(inputs.old_logprobs - inputs.rollout_logprobs).detach().abs()
    kept = (gap <= most).to(gap.dtype)
    return kept, {"left_out": 1 - kept}
