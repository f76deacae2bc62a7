"""Running coroutines together."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


async def run_all[T](work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run everything at once. The first error ends the rest and is raised as it is, not in a group of copies."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """End what still runs and wait for it; what it raises has no reader any more."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
