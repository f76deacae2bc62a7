"""Who runs reward code, and what comes of it."""

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from miles_core.errors import InputError
from miles_core.hooks import Reward
from miles_core.types import Prompt, Sample

# Each becomes a metric of its own.
_MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one sample, or why there is none.

    Attributes:
        reward: the number to learn from; NaN if there is none.
        parts: named parts of it.
        failure: empty, or a few words that are the same for the same cause.
        detail: of the failure.
    """

    reward: float = math.nan
    parts: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    detail: str = ""


class Judge(Protocol):
    """Runs a reward function over samples. Never raises for what the function does."""

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> Sequence[Verdict]:
        """Return one verdict per sample, in their order."""
        ...

    async def start(self) -> None:
        """Get ready; raise InputError for a reward that cannot be loaded."""
        ...

    async def close(self) -> None:
        """End what runs."""
        ...


class InProcessJudge:
    """Runs a trusted reward function in this process: fast, and without any limit on what it does.

    Samples of an `async def` are judged at the same time.
    """

    def __init__(self, reward: Reward, name: str):
        """Keep the function.

        Args:
            reward: with its parameters bound.
            name: of the function as the recipe has it, for messages.
        """
        self._reward = reward
        self._name = name

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        """See Judge.judge."""
        return await asyncio.gather(*[self._one(prompt, sample) for sample in samples])

    async def start(self) -> None:
        """See Judge.start."""
        await prepare(self._reward, self._name)

    async def close(self) -> None:
        """Nothing runs."""

    async def _one(self, prompt: Prompt, sample: Sample) -> Verdict:
        try:
            value = self._reward(prompt, sample)
            if inspect.isawaitable(value):
                value = await value
            return verdict_of(value, self._name)
        except Exception as error:  # noqa: BLE001  whatever user code raises is data here
            return Verdict(failure="reward raised", detail=f"{self._name}: {type(error).__name__}: {error}")


async def prepare(reward: Callable[..., Any], name: str) -> None:
    """Call what a reward function wants called before its first sample, if it has such a thing.

    That is its attribute `prepare`: it takes the recipe's parameters, may be async, and raises what makes judging
    impossible from the start.

    Args:
        reward: with its parameters bound.
        name: of the function as the recipe has it.

    Raises:
        InputError: it cannot judge here, and why.
    """
    function, params = (reward.func, reward.keywords) if isinstance(reward, functools.partial) else (reward, {})
    wanted = getattr(function, "prepare", None)
    if wanted is not None:
        try:
            value = wanted(**params)
            if inspect.isawaitable(value):
                await value
        except InputError:
            raise
        except Exception as error:  # user code may raise anything
            raise InputError(
                "hooks.reward", name, f"cannot be prepared ({type(error).__name__}: {error})", "Mend it."
            ) from error


def verdicts_of(values: Any, count: int, name: str) -> list[Verdict]:
    """Read what a group reward returned: a judgement per sample, in their order.

    Args:
        values: what it returned.
        count: of the samples.
        name: of the function, for the failure's detail.
    """
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        detail = f"{name} returned {values!r}: give one judgement for each of {count} samples"
        return [Verdict(failure="reward malformed", detail=detail[:500])] * count
    return [verdict_of(value, name) for value in values]


def verdict_of(value: Any, name: str) -> Verdict:
    """Read what a reward function returned: a number, or named parts with the total under "reward".

    Args:
        value: what it returned.
        name: of the function, for the failure's detail.
    """
    parts: Mapping[Any, Any] = value if isinstance(value, Mapping) else {"reward": value}
    if len(parts) > _MAX_PARTS:
        return Verdict(failure="reward malformed", detail=f"{name} returned {len(parts)} parts: {_MAX_PARTS} at most")
    if "reward" not in parts:
        found = sorted(map(str, parts))
        return Verdict(failure="reward malformed", detail=f'{name} returned no part "reward", but {found}'[:500])
    try:
        numbers = {str(key): float(number) for key, number in parts.items()}
    except (TypeError, ValueError):
        return Verdict(failure="reward malformed", detail=f"{name} returned {value!r}: give numbers"[:500])
    if not all(map(math.isfinite, numbers.values())):
        return Verdict(failure="reward not finite", detail=f"{name} returned {value!r}"[:500])
    total = numbers.pop("reward")
    return Verdict(total, numbers)
