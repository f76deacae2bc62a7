"""Called in each trainer process before old logprobs are computed.

Save as my_before_logprobs.py, and say in the recipe

    [hooks]
    before_logprobs = "my_before_logprobs:check"
"""

from miles_core import Batch


def check(batch: Batch) -> None:
    """Stop the run if a sample is longer than what this model was made for. `batch` is the rank's shard of the step."""
    longest = int(batch.lengths.max(initial=0))
    if longest > 131072:
        raise ValueError(f"a sample has {longest} tokens: lower rollout.max_new_tokens")
