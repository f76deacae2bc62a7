"""The driver's side of a run: the nouns of miles_core.loop over supervised actors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from miles_core import Batch, ContractViolation, Group
from miles_core.algorithms import Advantage, AdvantageInputs, Estimates
from miles_core.algorithms.advantages import with_kl_penalty
from miles_core.algorithms.kl import KLEstimator
from miles_core.algorithms.reductions import token_mean
from miles_core.batching import (
    advantage_inputs,
    make_batch,
    sample_columns,
    shard,
    split_minibatches,
    staleness,
)
from miles_core.cluster.actors import Crew, Member
from miles_core.hooks import DataSource, Reduction
from miles_core.observe import PhaseClock
from miles_core.queue import Lease
from miles_train.megatron.layout import Layout

ANSWER_MARGIN_S = 30.0  # at its own deadline the worker drops what is late; its answer comes a moment after


@dataclass(slots=True)
class ActorRollout:
    """Prompts to the worker, groups back through the queue, every one of them accounted for.

    Attributes:
        cursor: prompts handed out so far; where the data source goes on after a resume.
        frozen: the engine keeps version 0 (a control).
        metrics: of the last `generate`.
    """

    crew: Crew
    worker: Member
    queue: Member
    source: DataSource
    prompts_per_step: int
    deadline_s: float
    clock: PhaseClock
    cursor: int
    frozen: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    _lease: Lease = field(default_factory=lambda: Lease(-1, ()))
    _issued: int = 0
    _trained: int = 0
    _dropped: Counter[str] = field(default_factory=Counter)

    async def generate(self, step: int) -> Sequence[Group]:
        """Have one step's prompts answered and judged; raises what the worker raises when no group survives."""
        with self.clock.phase("generate"):
            prompts = self.source(self.cursor, self.prompts_per_step)
            # Version k is what step k samples with; a frozen engine serves what it started with.
            version = 0 if self.frozen else step
            deadline_s = self.deadline_s + ANSWER_MARGIN_S
            made = await self.crew.call(self.worker, "roll_out", step, version, prompts, deadline_s=deadline_s)
            self._lease = await self.crew.call(self.queue, "take", made.num_groups, deadline_s=deadline_s)
        self.cursor += len(prompts)
        self._issued += len(prompts)
        self._dropped.update(made.dropped)
        dropped = {f"rollout/dropped/{reason}": count for reason, count in self._dropped.items()}
        self.metrics = {**made.metrics, "rollout/dropped": self._dropped.total(), **dropped}
        return self._lease.groups

    async def acknowledge(self) -> None:
        """Count the leased groups as trained and check that the sums match.

        Raises:
            ContractViolation: a prompt is neither trained on nor dropped with a reason.
        """
        await self.crew.call(self.queue, "acknowledge", self._lease.id, deadline_s=self.deadline_s)
        self._trained += len(self._lease.groups)
        if lost := self._issued - self._trained - self._dropped.total():
            raise ContractViolation(
                f"of {self._issued} groups {self._trained} were trained on and {dict(self._dropped)} dropped: "
                f"{lost} are unaccounted for"
            )


@dataclass(frozen=True, slots=True)
class Learning:
    """What the driver does with rewards.

    Attributes:
        advantage: estimates advantages.
        reduction: what each token counts.
        kl_penalty: taken from the reward of each token, with its weight; None takes none.
        advantage_columns: optional columns that advantages are estimated from.
        loss_columns: optional columns that the loss reads.
    """

    advantage: Advantage
    reduction: Reduction = token_mean
    kl_penalty: tuple[KLEstimator, float] | None = None
    advantage_columns: frozenset[str] = frozenset()
    loss_columns: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GroupBatcher:
    """Rewards to advantages to balanced shards.

    Attributes:
        shuffle_seed: permute the rewards of all samples of a step first (a control that must not learn); None does not.
    """

    learning: Learning
    num_minibatches: int
    num_shards: int
    clock: PhaseClock
    shuffle_seed: int | None = None

    def build(self, step: int, groups: Sequence[Group]) -> Sequence[Sequence[Batch]]:
        """Return minibatches, each one of shards, one per copy of the model."""
        learning, wanted = self.learning, self.learning.loss_columns
        with self.clock.phase("batch"):
            inputs = advantage_inputs(groups, sample_columns(groups, learning.advantage_columns))
            if self.shuffle_seed is not None:
                inputs = _shuffled(inputs, np.random.default_rng([self.shuffle_seed, step]))
            if learning.kl_penalty is not None:
                inputs = with_kl_penalty(inputs, *learning.kl_penalty)
            estimated = learning.advantage(inputs)
            if not isinstance(estimated, Estimates):
                estimated = Estimates(estimated, np.zeros(0, np.float32))
            # A step's samples are of the version that the trainer has when it begins.
            own = {"returns": estimated.returns, "staleness": staleness(groups, step)}
            columns = {name: own[name] for name in wanted & own.keys()}
            columns |= sample_columns(groups, wanted - own.keys() - {"entropy", "group_index"})
            batch = make_batch(groups, estimated.advantages, learning.reduction, columns)
            shards = shard(batch, self.num_shards, self.num_minibatches, whole_groups="group_index" in wanted)
            return split_minibatches(shards, self.num_minibatches, learning.reduction)


def _shuffled(inputs: AdvantageInputs, generator: np.random.Generator) -> AdvantageInputs:
    order = generator.permutation(len(inputs.rewards))
    parts = {name: part[order] for name, part in inputs.reward_parts.items()}
    return inputs.replace(rewards=inputs.rewards[order], reward_parts=parts)


@dataclass(frozen=True, slots=True)
class ActorTrainer:
    """All trainer ranks as one.

    Attributes:
        layout: which rank brings which shard to a step.
    """

    crew: Crew
    ranks: Sequence[Member]
    layout: Layout
    deadline_s: float
    clock: PhaseClock

    async def step(self, minibatches: Sequence[Sequence[Batch]]) -> Mapping[str, float]:
        """Give every rank the shards of its copy of the model; the metrics, equal on all ranks, are rank 0's."""
        with self.clock.phase("train"):
            shard_of = [self.layout.shard_of(rank) for rank in range(len(self.ranks))]
            arguments = [([shards[number] for shards in minibatches],) for number in shard_of]
            return (await self.crew.call_all(self.ranks, "step", arguments, self.deadline_s))[0]

    async def save(self, step: int, state: Mapping[str, object]) -> str:
        """Write a checkpoint of the state after `step` steps; returns its folder."""
        return (await self._all("save", step, state))[0]

    async def export(self) -> str:
        """Write and verify the Hugging Face directory; returns its folder."""
        return (await self._all("export"))[0]

    async def _all(self, method: str, *arguments: object) -> list[str]:
        return await self.crew.call_all(self.ranks, method, [arguments] * len(self.ranks), self.deadline_s)


@dataclass(frozen=True, slots=True)
class ActorSync:
    """Pushes from the trainer to every engine; a frozen engine keeps version 0 (a control that must not learn)."""

    crew: Crew
    ranks: Sequence[Member]
    deadline_s: float
    clock: PhaseClock
    frozen: bool = False

    async def push(self, weight_version: int) -> Mapping[str, float]:
        """Push, verify, commit; every engine must echo the version and the digest."""
        if self.frozen:
            return {"sync/bytes": 0, "sync/version": 0}
        with self.clock.phase("sync"):
            arguments = [(weight_version,)] * len(self.ranks)
            return (await self.crew.call_all(self.ranks, "push", arguments, self.deadline_s))[0]
