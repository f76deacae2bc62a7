"""One prompt, one response."""

from collections.abc import Sequence

import numpy as np

from miles_core.types import Prompt, Sample, VersionSpan
from miles_rollout.engine import Completion
from miles_rollout.generate.types import GenerateContext
from miles_rollout.tokenizer import Tokenizer


async def single_turn(prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample]:
    """Sample `len(seeds)` responses to the prompt in one request. Every token of a response is trained on."""
    input_ids = context.tokenizer.encode(prompt.content)
    completions = await context.engine.generate(
        input_ids, context.sampling, len(seeds), seeds=seeds, namespace=str(context.weight_version)
    )
    prefix = np.asarray(input_ids, np.int32)
    return [_sample(prefix, completion, context.tokenizer) for completion in completions]


def _sample(prefix: np.ndarray, completion: Completion, tokenizer: Tokenizer) -> Sample:
    start, length = len(prefix), len(completion.tokens)
    return Sample(
        tokens=np.concatenate([prefix, completion.tokens]),
        loss_mask=np.arange(start + length) >= start,
        rollout_logprobs=np.concatenate([np.zeros(start, np.float32), completion.logprobs]),
        version_spans=tuple(
            VersionSpan(start + first, start + last, version) for first, last, version in completion.version_spans
        ),
        finish_reason=completion.finish_reason,
        text=tokenizer.decode(_without_stop(completion)),
    )


def _without_stop(completion: Completion) -> np.ndarray:
    """The response without the token that ended it: everything else is what the model said, special tokens too."""
    return completion.tokens[:-1] if completion.finish_reason == "stop" else completion.tokens
