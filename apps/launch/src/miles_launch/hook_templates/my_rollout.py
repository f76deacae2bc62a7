"""Which groups a step makes, and in which order.

Save as my_rollout.py, and say in the recipe

    [hooks]
    rollout = { name = "my_rollout:shortest_first", at_once = 8 }
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from miles_core import Prompt


async def shortest_first(
    prompts: Sequence[Prompt], make_group: Callable[[Prompt, int], Awaitable[Any]], *, at_once: int = 8
) -> list[Any]:
    """Start with the shortest prompts, at most `at_once` groups at the same time."""
    free = asyncio.Semaphore(at_once)

    async def one(number: int) -> Any:
        async with free:
            return await make_group(prompts[number], number)

    order = sorted(range(len(prompts)), key=lambda number: len(str(prompts[number].content)))
    outcomes = dict(zip(order, await asyncio.gather(*map(one, order)), strict=True))
    return [outcomes[number] for number in range(len(prompts))]
