"""The rollout worker: prompts in, judged groups out. Holds no GPU; plain Python with asyncio inside.

    prompt ─▶ generate (engine) ─▶ samples ─▶ judge (rewards) ─▶ group
                     └── failed after retries ──┴── raised, too slow, not finite ─▶ dropped, counted by reason

Groups run at the same time; each is judged as soon as it is generated.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_core.errors import ContractViolation, RolloutError
from miles_core.types import Group, Prompt, Sample
from miles_rollout.errors import EngineError
from miles_rollout.generate import GenerateContext, GenerateFn, single_turn
from miles_rollout.rewards import Judge


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How groups are made.

    Attributes:
        group_size: samples per prompt.
        seed: of the run; seeds of samples derive from it (see `sample_seed`).
        deadline_s: seconds for all groups of one call; those that are not ready by then are dropped.
    """

    group_size: int
    seed: int = 0
    deadline_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Dropped:
    """A group that could not be made.

    Attributes:
        prompt_id: whose group.
        reason: a few words, the same for the same cause.
        detail: what is known besides, e.g. the last line of a traceback.
    """

    prompt_id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one call made: `len(groups) + len(dropped)` is the number of prompts.

    Attributes:
        groups: judged, in the order of their prompts.
        dropped: in the order of their prompts.
        generate_s: seconds until the last response was there.
        reward_s: seconds from then until the last judgement.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    generate_s: float
    reward_s: float

    @property
    def dropped_reasons(self) -> Mapping[str, int]:
        """How many groups were dropped for which reason."""
        return Counter(item.reason for item in self.dropped)


class RolloutWorker:
    """Makes judged groups from prompts."""

    def __init__(
        self,
        context: GenerateContext,
        judge: Judge,
        settings: WorkerSettings,
        generate: GenerateFn = single_turn,
    ):
        """Put the parts together; the worker closes engine and judge with itself.

        Args:
            context: engine, tokenizer and sampling; its weight_version is replaced by that of each call.
            judge: gives rewards.
            settings: group size, seed, deadline.
            generate: how a prompt becomes samples.
        """
        self._context = context
        self._judge = judge
        self._settings = settings
        self._generate = generate

    async def rollout(self, prompts: Sequence[Prompt], *, step: int, weight_version: int) -> Rollout:
        """Make one group per prompt.

        Args:
            prompts: of this step, in the order that seeds are counted in.
            step: number of the step, for seeds.
            weight_version: that the engine must serve, or the samples are not what they say.

        Raises:
            RolloutError: not one group could be made; the message has the commonest reason and its detail.
            ContractViolation: the engine sampled with other weights than `weight_version`.
        """
        context = GenerateContext(self._context.engine, self._context.tokenizer, self._context.sampling, weight_version)
        start = time.monotonic()
        made: list[float] = []
        results = await _all(self._group(prompt, step, index, context, made) for index, prompt in enumerate(prompts))
        groups = tuple(result for result in results if isinstance(result, Group))
        dropped = tuple(result for result in results if isinstance(result, Dropped))
        if dropped and not groups:
            raise RolloutError(_all_failed(dropped, step))
        generated = max(made, default=start)
        return Rollout(groups, dropped, generated - start, time.monotonic() - generated)

    async def close(self) -> None:
        """Let go of the engine's connections and end the reward processes."""
        await self._judge.close()
        await self._context.engine.close()

    async def _group(
        self, prompt: Prompt, step: int, index: int, context: GenerateContext, made: list[float]
    ) -> Group | Dropped:
        settings = self._settings
        seeds = [sample_seed(settings.seed, step, index, sample) for sample in range(settings.group_size)]
        try:
            async with asyncio.timeout(settings.deadline_s):
                samples = await self._generate(prompt, seeds, context)
                made.append(time.monotonic())
                _check_versions(samples, context)
                verdicts = await self._judge.judge(prompt, samples)
        except EngineError as error:
            return Dropped(prompt.id, error.reason, error.detail)
        except TimeoutError:
            return Dropped(prompt.id, "rollout deadline", f"not ready after {settings.deadline_s:g} s")
        bad = next((verdict for verdict in verdicts if verdict.failure), None)
        if bad is not None:
            return Dropped(prompt.id, bad.failure, bad.detail)
        judged = (
            sample.replace(reward=verdict.reward, reward_parts=verdict.parts)
            for sample, verdict in zip(samples, verdicts, strict=True)
        )
        return Group(prompt, tuple(judged))


def sample_seed(run_seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one sample: 63 bits of a hash, the same on every machine."""
    text = f"{run_seed}/{step}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


async def _all[T](work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run everything at once. The first error ends the rest and is raised as it is, not in a group of copies."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_versions(samples: Sequence[Sample], context: GenerateContext) -> None:
    found = {span.weight_version for sample in samples for span in sample.version_spans}
    if found - {context.weight_version}:
        raise ContractViolation(
            f"weight_version {context.weight_version} was published and the engine sampled with {sorted(found)}: "
            "an update was lost or another trainer pushes to the same engine. Samples of this step are discarded."
        )


def _all_failed(dropped: Sequence[Dropped], step: int) -> str:
    (reason, count), *_ = Counter(item.reason for item in dropped).most_common()
    example = next(item for item in dropped if item.reason == reason)
    detail = f": {example.detail}" if example.detail else ""
    return (
        f"no group of step {step} could be made: {count} of {len(dropped)} dropped because of {reason!r}{detail} "
        f"(first seen at prompt {example.prompt_id!r})."
    )
