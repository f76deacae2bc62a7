"""Writes a run down step by step: metrics, samples, checkpoints; calls the driver's hooks; stops when asked to."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_core import Group, Interrupted, StepReport
from miles_core.observe import MetricsLog, PhaseClock, rollout_metrics, write_samples
from miles_launch.roles import ActorRollout, ActorTrainer


@dataclass(frozen=True, slots=True)
class DriverHooks:
    """User code that runs in the driver; None where the recipe names none."""

    metrics: Callable[..., Any] | None = None
    after_step: Callable[..., Any] | None = None
    on_checkpoint: Callable[..., Any] | None = None


@dataclass(slots=True)
class RunRecorder:
    """Keeps what a step did.

    Attributes:
        stop: set when the run was asked to stop; honoured at the end of the step.
        last_step: after which a checkpoint is always written.
        saved_after: the step after which the newest checkpoint was written, or None.
    """

    log: MetricsLog
    clock: PhaseClock
    rollout: ActorRollout
    trainer: ActorTrainer
    samples_dir: Path
    samples_every: int
    save_every: int
    last_step: int
    stop: asyncio.Event
    hooks: DriverHooks = DriverHooks()
    saved_after: int | None = None
    _writing: list["asyncio.Task[Path]"] = field(default_factory=list)

    async def after_step(self, step: int, groups: Sequence[Group], metrics: Mapping[str, float]) -> None:
        """Write the step down; save when it is due; raise Interrupted, saved, when asked to stop."""
        with self.clock.phase("record"):
            gathered = {**rollout_metrics(groups, step), **self.rollout.metrics, **metrics}
            if self.hooks.metrics is not None:
                gathered |= self.hooks.metrics(groups)
            self._keep_samples(step, groups)
        if self._save_is_due(step):
            with self.clock.phase("save"):
                await self._save(step)
        gathered |= self._times(gathered)
        self.log.write(step, gathered)
        if self.hooks.after_step is not None:
            self.hooks.after_step(StepReport(step, step + 1, gathered), groups)
        if self.stop.is_set() and step != self.last_step:
            raise Interrupted(f"stopped after step {step} as asked; the state is saved")

    async def close(self) -> None:
        """Finish what is being written."""
        await asyncio.gather(*self._writing)
        self.log.close()

    def _keep_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Every few steps, and the last; in a thread, since compressing Parquet takes longer than a small step."""
        if self.samples_every and (step % self.samples_every == 0 or step == self.last_step):
            for task in filter(asyncio.Task.done, self._writing):
                task.result()  # a write that failed ends the run at the next one
            self._writing = [task for task in self._writing if not task.done()]
            self._writing.append(asyncio.create_task(asyncio.to_thread(write_samples, self.samples_dir, step, groups)))

    def _save_is_due(self, step: int) -> bool:
        regular = bool(self.save_every) and (step + 1) % self.save_every == 0
        return regular or step == self.last_step or self.stop.is_set()

    async def _save(self, step: int) -> None:
        state = {"step": step + 1, "weight_version": step + 1, "cursor": self.rollout.cursor}
        path = Path(await self.trainer.save(step + 1, state))
        self.log.sync()
        self.saved_after = step
        if self.hooks.on_checkpoint is not None:
            self.hooks.on_checkpoint(step, path)

    def _times(self, metrics: Mapping[str, float]) -> dict[str, float]:
        times = self.clock.lap()
        tokens = metrics["rollout/response_len"] * metrics["rollout/num_samples"]
        return times | {
            "perf/tokens_per_s": tokens / times["perf/time/step"],
            "perf/engine_tokens_per_s": tokens / times["perf/time/generate"],
        }
