"""Rewards of whole groups: all answers to a prompt judged together."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any

from miles_core.hooks import GroupReward
from miles_core.types import Prompt, Sample
from miles_rollout.rewards.judge import Verdict, prepare, verdicts_of


class GroupJudge:
    """Runs a trusted group reward in this process, off its event loop; a `Judge`.

    A call that does not come back in time is given up. What it does goes on in its thread: nothing here can kill it.
    """

    def __init__(self, reward: GroupReward, name: str, timeout_s: float):
        """Keep the function.

        Args:
            reward: with its parameters bound.
            name: of the function as the recipe has it, for messages.
            timeout_s: most seconds of one call.
        """
        self._reward, self._name, self._timeout_s = reward, name, timeout_s

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> Sequence[Verdict]:
        """See Judge.judge."""
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await self._call(prompt, samples)
        except TimeoutError:
            failed = Verdict(failure="reward timeout", detail=f"{self._name} took more than {self._timeout_s:g} s")
            return [failed] * len(samples)
        except Exception as error:  # noqa: BLE001  whatever user code raises is data here
            failed = Verdict(failure="reward raised", detail=f"{self._name}: {type(error).__name__}: {error}")
            return [failed] * len(samples)
        return verdicts_of(values, len(samples), self._name)

    async def start(self) -> None:
        """See Judge.start."""
        await prepare(self._reward, self._name)

    async def close(self) -> None:
        """Nothing runs."""

    async def _call(self, prompt: Prompt, samples: Sequence[Sample]) -> Any:
        if inspect.iscoroutinefunction(self._reward):
            return await self._reward(prompt, samples)
        value = await asyncio.to_thread(self._reward, prompt, samples)
        return await value if inspect.isawaitable(value) else value
