"""The rollout worker: prompts in, judged groups out. Holds no GPU; plain Python with asyncio inside.

    prompt ─▶ generate (engine) ─▶ filter ─▶ judge (rewards) ─▶ filter ─▶ group
                 │  failed after retries     │  raised, too slow, not finite
                 └── sample lost, counted ───┘  too few left, filtered, late, not needed ─▶ group dropped, counted

Groups run at the same time; each is judged as soon as it is generated.
"""

import asyncio
import hashlib
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from miles_core.errors import ContractViolation, RolloutError
from miles_core.hooks import SampleFilter
from miles_core.hooks.protocols import Rollout as RolloutHook
from miles_core.types import Group, Prompt, Sample
from miles_rollout._concurrent import cancel_all
from miles_rollout.dynamic import DynamicSampling
from miles_rollout.errors import EngineError
from miles_rollout.generate import GenerateContext, GenerateFn, LostSample, single_turn
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
    """A group that could not be made, or is not wanted.

    Attributes:
        prompt_id: whose group.
        reason: a few words, the same for the same cause.
        detail: what is known besides, e.g. the last line of a traceback.
        rewards: of its samples, where it was judged.
        lost: its samples that could not be made or judged.
    """

    prompt_id: str
    reason: str
    detail: str = ""
    rewards: tuple[float, ...] = ()
    lost: tuple[LostSample, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one call made: `len(groups) + len(dropped)` is the number of prompts, those of refills included.

    Attributes:
        groups: judged, in the order of their prompts.
        dropped: in the order of their prompts.
        generate_s: seconds until the last response was there.
        reward_s: seconds from then until the last judgement.
        lost: samples missing in the groups that were kept.
        refilled: prompts that were taken in place of others.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Dropped, ...]
    generate_s: float
    reward_s: float
    lost: tuple[LostSample, ...] = ()
    refilled: int = 0

    @property
    def dropped_reasons(self) -> Mapping[str, int]:
        """How many groups were dropped for which reason."""
        return Counter(item.reason for item in self.dropped)

    @property
    def rewards(self) -> Mapping[str, Sequence[float]]:
        """Rewards by prompt id, of every group that was judged, kept or not: what a curriculum learns from."""
        judged = {item.prompt_id: item.rewards for item in self.dropped if item.rewards}
        return {**judged, **{group.id: tuple(group.rewards.tolist()) for group in self.groups}}

    @property
    def metrics(self) -> Mapping[str, float]:
        """Counts of this call by slash names; those of conversations only where there were any."""
        lost = [*self.lost, *(sample for item in self.dropped for sample in item.lost)]
        counts: dict[str, float] = {
            "rollout/dropped": len(self.dropped),
            "rollout/lost_samples": len(lost),
            "rollout/refilled": self.refilled,
        }
        counts |= {f"rollout/dropped/{reason}": count for reason, count in self.dropped_reasons.items()}
        counts |= {f"rollout/lost_samples/{key}": n for key, n in Counter(sample.reason for sample in lost).items()}
        talks = [sample.metadata for group in self.groups for sample in group.samples if "turns" in sample.metadata]
        if talks:
            counts["rollout/turns_mean"] = sum(talk["turns"] for talk in talks) / len(talks)
            counts["rollout/rewritten_turns"] = sum(talk["rewritten_turns"] for talk in talks)
            counts["rollout/extra_branches"] = sum(talk["branch"] > 0 for talk in talks)
        return counts


@dataclass(frozen=True, slots=True)
class _Kept:
    group: Group
    lost: tuple[LostSample, ...]


_Outcome = _Kept | Dropped


@dataclass(frozen=True, slots=True)
class _Call:
    """What all groups of one call share. `made` collects when responses were there."""

    step: int
    context: GenerateContext
    deadline: float
    made: list[float]


class RolloutWorker:
    """Makes judged groups from prompts."""

    def __init__(
        self,
        context: GenerateContext,
        judge: Judge,
        settings: WorkerSettings,
        generate: GenerateFn = single_turn,
        *,
        rollout: RolloutHook | None = None,
        filter_before_reward: SampleFilter | None = None,
        sample_filter: SampleFilter | None = None,
    ):
        """Put the parts together; the worker closes engine and judge with itself.

        Args:
            context: engine, tokenizer and sampling; its weight_version is replaced by that of each call.
            judge: gives rewards, to samples that `generate` gave none.
            settings: group size, seed, deadline.
            generate: how a prompt becomes samples.
            rollout: which groups are made in which order; by default all at the same time.
            filter_before_reward: drops groups before they are judged.
            sample_filter: drops groups once they are.
        """
        self._context = context
        self._judge = judge
        self._settings = settings
        self._generate = generate
        self._rollout = rollout
        self._before, self._after = filter_before_reward, sample_filter

    async def rollout(
        self, prompts: Sequence[Prompt], *, step: int, weight_version: int, dynamic: DynamicSampling | None = None
    ) -> Rollout:
        """Make one group per prompt, or as many as `dynamic` wants.

        Args:
            prompts: of this step, in the order that seeds are counted in.
            step: number of the step, for seeds.
            weight_version: that the engine must serve, or the samples are not what they say.
            dynamic: how many groups are wanted, and where further prompts come from when some are dropped.

        Raises:
            RolloutError: not one group could be made; the message has the commonest reason and its detail.
            ContractViolation: the engine sampled with other weights than `weight_version`, or the rollout function did
                not hand on an outcome for each prompt.
            ValueError: `dynamic` with a rollout function of one's own: who decides what is made?
        """
        if dynamic is not None and self._rollout is not None:
            raise ValueError("dynamic sampling decides itself which groups are made: leave hooks.rollout out")
        start = time.monotonic()
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_s
        call = _Call(step, replace(self._context, weight_version=weight_version), deadline, [])
        if self._rollout is not None:
            outcomes = await self._by_hook(self._rollout, prompts, call)
        else:
            outcomes = await self._at_once(prompts, call, dynamic or DynamicSampling(len(prompts)))
        kept = [outcome for outcome in outcomes if isinstance(outcome, _Kept)]
        dropped = tuple(outcome for outcome in outcomes if isinstance(outcome, Dropped))
        if dropped and not kept:
            raise RolloutError(_all_failed(dropped, step))
        generated = max(call.made, default=start)
        return Rollout(
            groups=tuple(outcome.group for outcome in kept),
            dropped=dropped,
            generate_s=generated - start,
            reward_s=time.monotonic() - generated,
            lost=tuple(sample for outcome in kept for sample in outcome.lost),
            refilled=len(outcomes) - len(prompts),
        )

    async def close(self) -> None:
        """Let go of the engine's connections and end the reward processes."""
        await self._judge.close()
        await self._context.engine.close()

    async def _by_hook(self, hook: RolloutHook, prompts: Sequence[Prompt], call: _Call) -> list[_Outcome]:
        outcomes = list(await hook(prompts, lambda prompt, number: self._group(prompt, number, call)))
        found = [outcome.group.id if isinstance(outcome, _Kept) else outcome.prompt_id for outcome in outcomes]
        if found != [prompt.id for prompt in prompts]:
            raise ContractViolation(
                f"hooks.rollout returned outcomes of {found} for the prompts {[prompt.id for prompt in prompts]}: "
                "it must return what make_group gave, one for each prompt, in their order."
            )
        return outcomes

    async def _at_once(self, prompts: Sequence[Prompt], call: _Call, dynamic: DynamicSampling) -> list[_Outcome]:
        """Everything at once; what is dropped is made up for, and what is no longer needed is ended.

        Which prompts are taken does not depend on who is ready first: each drop takes the next one, so that they are
        always the first prompts with `wanted` groups to keep among them. Not so where more are given than wanted.
        """
        handed = list(prompts)
        outcomes: dict[int, _Outcome] = {}
        running = {asyncio.ensure_future(self._group(prompt, i, call)): i for i, prompt in enumerate(prompts)}
        try:
            while running:
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                outcomes |= {running.pop(task): task.result() for task in done}
                num_kept = sum(isinstance(outcome, _Kept) for outcome in outcomes.values())
                if num_kept >= dynamic.wanted:
                    break
                missing = dynamic.missing(num_kept + len(running), len(handed))
                if missing and asyncio.get_running_loop().time() < call.deadline:
                    for prompt in await dynamic.take(missing):
                        running[asyncio.ensure_future(self._group(prompt, len(handed), call))] = len(handed)
                        handed.append(prompt)
        finally:
            await cancel_all(running)
        return _first_wanted(handed, outcomes, dynamic.wanted)

    async def _group(self, prompt: Prompt, number: int, call: _Call) -> _Outcome:
        settings = self._settings
        seeds = [sample_seed(settings.seed, call.step, number, sample) for sample in range(settings.group_size)]
        try:
            async with asyncio.timeout_at(call.deadline):
                made = await self._generate(prompt, seeds, call.context)
                call.made.append(time.monotonic())
                samples = [sample for sample in made if isinstance(sample, Sample)]
                _check_versions(samples, call.context)
                lost = [sample for sample in made if isinstance(sample, LostSample)]
                return await self._judged(prompt, samples, lost)
        except EngineError as error:
            return Dropped(prompt.id, error.reason, error.detail)
        except TimeoutError:
            return Dropped(prompt.id, "rollout deadline", f"not ready after {settings.deadline_s:g} s")

    async def _judged(self, prompt: Prompt, samples: Sequence[Sample], lost: Sequence[LostSample]) -> _Outcome:
        reason = None if self._before is None or not samples else self._before(Group(prompt, tuple(samples)))
        if reason is not None:
            return Dropped(prompt.id, reason, lost=tuple(lost))
        open_samples = [sample for sample in samples if math.isnan(sample.reward)]
        judged = await self._judge.judge(prompt, open_samples) if open_samples else ()
        verdicts = dict(zip(map(id, open_samples), judged, strict=True))
        kept: list[Sample] = []
        missing = list(lost)
        for sample in samples:
            verdict = verdicts.get(id(sample))
            if verdict is None:
                kept.append(sample)
            elif verdict.failure:
                missing.append(LostSample(verdict.failure, verdict.detail))
            else:
                kept.append(sample.replace(reward=verdict.reward, reward_parts=verdict.parts))
        # One sample alone has nothing to be compared with.
        if not kept or (missing and len(kept) < min(2, self._settings.group_size)):
            cause = _commonest(missing or [LostSample("no samples", "the generate function returned none")])
            return Dropped(prompt.id, cause.reason, cause.detail, lost=tuple(missing))
        group = Group(prompt, tuple(kept))
        reason = None if self._after is None else self._after(group)
        if reason is not None:
            return Dropped(prompt.id, reason, rewards=tuple(group.rewards.tolist()), lost=tuple(missing))
        return _Kept(group, tuple(missing))


def sample_seed(run_seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """The seed of one sample: 63 bits of a hash, the same on every machine."""
    text = f"{run_seed}/{step}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> 1


def _first_wanted(handed: Sequence[Prompt], outcomes: Mapping[int, _Outcome], wanted: int) -> list[_Outcome]:
    """An outcome for each prompt in their order; groups beyond those wanted and what was ended count as such."""
    every: list[_Outcome] = []
    num_kept = 0
    for number, prompt in enumerate(handed):
        outcome = outcomes.get(number) or Dropped(prompt.id, "over-sampled", "ended when there were enough groups")
        if isinstance(outcome, _Kept):
            num_kept += 1
            if num_kept > wanted:
                rewards = tuple(outcome.group.rewards.tolist())
                outcome = Dropped(
                    prompt.id, "over-sampled", "ready when there were enough groups", rewards, outcome.lost
                )
        every.append(outcome)
    return every


def _check_versions(samples: Sequence[Sample], context: GenerateContext) -> None:
    found = {span.weight_version for sample in samples for span in sample.version_spans}
    if found - {context.weight_version}:
        raise ContractViolation(
            f"weight_version {context.weight_version} was published and the engine sampled with {sorted(found)}: "
            "an update was lost or another trainer pushes to the same engine. Samples of this step are discarded."
        )


def _commonest[T: Dropped | LostSample](items: Sequence[T]) -> T:
    """The first of those with the commonest reason."""
    (reason, _), *_ = Counter(item.reason for item in items).most_common()
    return next(item for item in items if item.reason == reason)


def _all_failed(dropped: Sequence[Dropped], step: int) -> str:
    example = _commonest(dropped)
    count = sum(item.reason == example.reason for item in dropped)
    detail = f": {example.detail}" if example.detail else ""
    return (
        f"no group of step {step} could be made: {count} of {len(dropped)} dropped because of {example.reason!r}"
        f"{detail} (first seen at prompt {example.prompt_id!r})."
    )
