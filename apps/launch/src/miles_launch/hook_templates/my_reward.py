"""The reward of a sample.

Save as my_reward.py, and say in the recipe

    [hooks]
    reward = { name = "my_reward:score", too_long = 200 }
"""

from miles_core import Prompt, Sample


def score(prompt: Prompt, sample: Sample, *, too_long: int = 200) -> dict[str, float]:
    """1 if the answer is in the response, less what length costs; the parts become metrics.

    A plain number will do as well. `async def` is fine for code that waits.
    """
    right = float(str(prompt.metadata.get("answer", "")) in sample.text)
    length = min(1.0, len(sample.text) / too_long)
    return {"reward": right - 0.1 * length, "right": right, "length": length}
