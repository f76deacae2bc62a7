"""How a prompt becomes samples.

Save as my_generate.py, and say in the recipe

    [hooks]
    generate = { name = "my_generate:with_hint", hint = "Think step by step." }
"""

from collections.abc import Sequence
from dataclasses import replace

from miles_core import Prompt, Sample
from miles_rollout.generate import GenerateContext, single_turn


async def with_hint(prompt: Prompt, seeds: Sequence[int], context: GenerateContext, *, hint: str = "") -> list[Sample]:
    """Put a hint before the prompt, sample one response per seed, and remember what was said."""
    if isinstance(prompt.content, str):
        content = f"{hint} {prompt.content}".strip()
    else:
        content = [{"role": "system", "content": hint}, *prompt.content] if hint else prompt.content
    samples = await single_turn(replace(prompt, content=content), seeds, context)
    return [sample.replace(metadata={**sample.metadata, "hint": hint}) for sample in samples]
