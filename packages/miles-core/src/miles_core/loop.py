"""The loop: generate, learn, push; one step is one turn of this wheel.

    prompts ─▶ rollout ─▶ queue ─▶ batcher ─▶ trainer ─▶ sync ─▶ engines
                  ▲                                          │
                  └────────── the new weight_version ◀───────┘

Who does each verb is behind a protocol; placement, retries and metrics live there, not here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from miles_core.errors import ContractViolation
from miles_core.types import Batch, Group


class Rollout(Protocol):
    """Makes the groups of a step."""

    async def generate(self, step: int) -> Sequence[Group]:
        """Return the judged groups of `step`, leased from the queue."""
        ...

    async def acknowledge(self) -> None:
        """The groups of the last `generate` were trained on and their weights published."""
        ...


class Batcher(Protocol):
    """Turns groups into what the trainer ranks learn from."""

    def build(self, step: int, groups: Sequence[Group]) -> Sequence[Sequence[Batch]]:
        """Return minibatches; each is one shard per data-parallel rank."""
        ...


class Trainer(Protocol):
    """Updates the policy."""

    async def step(self, minibatches: Sequence[Sequence[Batch]]) -> Mapping[str, float]:
        """Update once per minibatch and return metrics, among them `train/logprob_gap`."""
        ...


class Sync(Protocol):
    """Publishes the policy."""

    async def push(self, weight_version: int) -> Mapping[str, float]:
        """Bring the trainer's weights to every engine as `weight_version`, verified; return metrics."""
        ...


class Recorder(Protocol):
    """Keeps what a step did: metrics, samples, checkpoints, hooks."""

    async def after_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Write the step down; save when it is due. Raises Interrupted, saved, when the run was asked to stop."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """The nouns of a run, and where it begins.

    Attributes:
        steps: the steps to do; starts above 0 when resumed.
        weight_version: of the trainer's weights before the first of them.
        contract: what must hold at the first of them.
    """

    steps: Iterable[int]
    weight_version: int
    rollout: Rollout
    batcher: Batcher
    trainer: Trainer
    sync: Sync
    recorder: Recorder
    contract: "LogprobGap"


async def train(run: Run) -> None:
    """Run all steps of the synchronous schedule."""
    await run.sync.push(run.weight_version)
    for step in run.steps:
        groups = await run.rollout.generate(step)
        minibatches = run.batcher.build(step, groups)
        learned = await run.trainer.step(minibatches)
        run.contract.check(step, learned)
        pushed = await run.sync.push(step + 1)
        await run.rollout.acknowledge()
        await run.recorder.after_step(step, groups, {**learned, **pushed})


@dataclass(slots=True)
class LogprobGap:
    """The contract of step 0: with freshly pushed weights, trainer and engine agree on the same tokens.

    Checked at the first step of a process: at later ones the gap is a metric.

    Attributes:
        bound: largest mean |trainer - engine| logprob.
        first_step: the step that is checked.
    """

    bound: float
    first_step: int

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise ContractViolation when the gap of the first step exceeds the bound (or is not a number)."""
        if step != self.first_step:
            return
        gap = metrics["train/logprob_gap"]
        if not gap <= self.bound:
            where = ", ".join(f"{k.rpartition('/')[2]} {v:g}" for k, v in metrics.items() if k.startswith("train/gap_"))
            raise ContractViolation(
                f"trainer and engine disagree at step {step}: mean |logprob difference| {gap:.3g} exceeds the bound "
                f"contracts.max_logprob_gap = {self.bound:g} ({where or 'no detail'}). The same weights were pushed "
                "just before, so the two compute different models: check dtype, rope and norm settings and the "
                "sampling temperature; raise the bound only if you know the reason. Nothing was published."
            )
