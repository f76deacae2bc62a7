"""Tasks of reasoning-gym, each judged by its own verifier. Needs miles-rollout[reasoning-gym]."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from miles_core.types import Prompt, Sample
from miles_rollout.rewards.metadata import entry, structure

try:
    _gym: Any = importlib.import_module("reasoning_gym")
except ImportError as error:
    raise ImportError('reasoning-gym is not installed: pip install "miles-rollout[reasoning-gym]"') from error


def reasoning_gym(prompt: Prompt, sample: Sample, *, key: str = "entry", dataset: str | None = None) -> float:
    """The score that a reasoning-gym dataset gives to the response's answer, between 0 and 1.

    The answer is the text in the last <answer>...</answer>; without one, it is all of the text.

    Args:
        prompt: its metadata holds the dataset's entry, or JSON text of it: question, answer and metadata as
            reasoning-gym made them.
        sample: judged by its text.
        key: of the metadata.
        dataset: whose entries they are; by default each says so itself, in metadata.source_dataset.
    """
    item = structure(prompt, key)
    name = dataset or entry(Prompt(prompt.id, "", item["metadata"]), "source_dataset")
    return float(_scorer(name)(_gym.utils.extract_answer(sample.text) or sample.text.strip(), item))


@functools.cache
def _scorer(name: str) -> Callable[..., Any]:
    return _gym.get_score_answer_fn(name)
