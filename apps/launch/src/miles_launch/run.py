"""One run from a checked recipe to an exported model: start the processes, drive the loop, close everything."""

import asyncio
import contextlib
import functools
import math
import os
import secrets
import signal
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_core import Interrupted, Recipe
from miles_core.cluster import Plan, Role, place
from miles_core.cluster.actors import Crew, Member
from miles_core.cluster.runtime import ray_cluster
from miles_core.cluster.warden import warden
from miles_core.loop import LogprobGap, Run, train
from miles_core.observe import Console, MetricsLog, PhaseClock, Sink, TraceFile
from miles_core.ports import free_port
from miles_launch.prepare import Prepared
from miles_launch.recorder import RunRecorder
from miles_launch.roles import ActorRollout, ActorSync, ActorTrainer, GroupBatcher
from miles_launch.rundir import RunDir

# Processes of a run on a machine without GPUs take turns on its cores; one thread each (SGLang's CPU engine loses a
# factor of 30 to threads that spin against each other), and nothing may ask for a compiler.
ACTOR_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
ACTORS = "miles_launch.actors"
SYNC_TOKEN_VARIABLE = "MILES_SYNC_TOKEN"  # where miles_sync.sglang looks for it inside the engine


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a resumed run goes on: as written by RunRecorder.

    Attributes:
        path: the checkpoint's folder.
        step: next step to do.
        weight_version: of the weights in it.
        cursor: prompts handed out before it.
    """

    path: Path | None = None
    step: int = 0
    weight_version: int = 0
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class Crewed:
    """The started processes of a run."""

    crew: Crew
    trainers: Sequence[Member]
    worker: Member
    queue: Member


def roles_of(recipe: Recipe) -> list[Role]:
    """The processes of a run and the logical CPUs they ask for."""
    return [
        Role("trainer", recipe.train.num_ranks),
        Role("engine", 1),
        Role("worker", 1, num_cpus=0.5),
        Role("queue", 1, num_cpus=0.5),
    ]


def run(
    prepared: Prepared, run_dir: RunDir, checkpoint: Checkpoint, console: Console, sinks: Sequence[Sink] = ()
) -> None:
    """Start the cluster and drive the run to its end; metrics go to the console and to `sinks`.

    Raises:
        Interrupted: SIGINT or SIGTERM came; what could be saved is saved.
        MilesError: whatever ended the run; no process of it is left.
    """
    recipe = prepared.recipe
    roles = roles_of(recipe)
    num_cpus = max(os.cpu_count() or 1, math.ceil(sum(role.count * role.num_cpus for role in roles)))
    console.status("starting Ray")
    with warden(), ray_cluster(recipe.cluster.address, num_cpus, recipe.cluster.dashboard_port) as cluster:
        try:
            asyncio.run(_drive(prepared, run_dir, checkpoint, console, sinks, place(cluster, roles)))
        except asyncio.CancelledError as error:
            raise Interrupted(f"{error}; what came after the last checkpoint is lost") from None


async def _drive(
    prepared: Prepared,
    run_dir: RunDir,
    checkpoint: Checkpoint,
    console: Console,
    sinks: Sequence[Sink],
    plan: Plan,
) -> None:
    stop = asyncio.Event()
    crew = Crew(plan, run_dir.logs)
    with _signals(stop, console):
        try:
            console.status("starting engine, trainer and worker")
            crewed = await _unless(stop, _hire(crew, prepared, run_dir, checkpoint))
            console.status("")
            await _loop(crewed, prepared, run_dir, checkpoint, console, sinks, stop)
        finally:
            console.status("closing")
            await crew.dismiss()


async def _hire(crew: Crew, prepared: Prepared, run_dir: RunDir, checkpoint: Checkpoint) -> Crewed:
    """Start all processes at once, then introduce them to each other."""
    recipe = prepared.recipe
    deadline_s = recipe.cluster.start_deadline_s
    sync_token = secrets.token_urlsafe(32)
    hire = functools.partial(crew.hire, deadline_s=deadline_s)
    num_ranks = recipe.train.num_ranks
    common = {"recipe": recipe, "model_path": str(prepared.model_path.resolve())}
    port = free_port()
    engine, worker, queue, *trainers = await asyncio.gather(
        hire(
            "engine", 0, f"{ACTORS}:EngineActor", ACTOR_ENVIRONMENT | {SYNC_TOKEN_VARIABLE: sync_token},
            log_path=str(run_dir.logs.resolve() / "sglang-0.log"), **common,
        ),
        hire("worker", 0, f"{ACTORS}:WorkerActor", ACTOR_ENVIRONMENT, **common),
        hire("queue", 0, "miles_core.queue:SampleQueue", ACTOR_ENVIRONMENT, capacity=recipe.rollout.prompts_per_step),
        *(
            hire(
                "trainer", rank, f"{ACTORS}:TrainerActor", ACTOR_ENVIRONMENT, rank=rank, master_port=port,
                run_path=str(run_dir.path.resolve()), resume_from=checkpoint.path,
                sync_token=sync_token, **common,
            )
            for rank in range(num_ranks)
        ),
    )  # fmt: skip
    address = await crew.call(engine, "address", deadline_s=deadline_s)
    await crew.call(worker, "connect", address, queue, deadline_s=deadline_s)
    await crew.call_all(trainers, "connect", [([address],)] * num_ranks, deadline_s)
    return Crewed(crew, trainers, worker, queue)


async def _loop(
    crewed: Crewed,
    prepared: Prepared,
    run_dir: RunDir,
    checkpoint: Checkpoint,
    console: Console,
    sinks: Sequence[Sink],
    stop: asyncio.Event,
) -> None:
    """Compose the nouns of the loop and run it; write everything out whatever ends it."""
    recipe, crew = prepared.recipe, crewed.crew
    trace = TraceFile(run_dir.trace / "driver.json")
    clock = PhaseClock(on_span=trace.add)
    step_s = recipe.train.deadline_s
    rollout = ActorRollout(
        crew, crewed.worker, crewed.queue, prepared.source,
        recipe.rollout.prompts_per_step, recipe.rollout.deadline_s, clock, checkpoint.cursor,
        recipe.controls.freeze_engine,
    )  # fmt: skip
    trainer = ActorTrainer(crew, crewed.trainers, prepared.layout, step_s, clock)
    sync = ActorSync(crew, crewed.trainers, recipe.sync.deadline_s, clock, recipe.controls.freeze_engine)
    recorder = RunRecorder(
        log=MetricsLog(run_dir.metrics, checkpoint.step, [console, *sinks]),
        clock=clock, rollout=rollout, trainer=trainer, samples_dir=run_dir.samples,
        samples_every=recipe.observe.samples_every, save_every=recipe.train.save_every,
        last_step=recipe.train.steps - 1, stop=stop, hooks=prepared.hooks,
    )  # fmt: skip
    batcher = GroupBatcher(
        prepared.learning, recipe.algorithm.num_minibatches, prepared.layout.num_shards, clock,
        shuffle_seed=recipe.seed if recipe.controls.shuffle_rewards else None,
    )  # fmt: skip
    steps = range(checkpoint.step, recipe.train.steps)
    contract = LogprobGap(prepared.max_logprob_gap, checkpoint.step)
    clock.lap()  # what starting took is no part of the first step
    try:
        await train(Run(steps, checkpoint.weight_version, rollout, batcher, trainer, sync, recorder, contract))
        console.status("exporting the model")
        await trainer.export()
    finally:
        await recorder.close()
        trace.close()


async def _unless[T](stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, or end it when the run is asked to stop."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not task.done():
        task.cancel()
        raise Interrupted("stopped before the first step as asked; there was nothing to save yet")
    return task.result()


@contextlib.contextmanager
def _signals(stop: asyncio.Event, console: Console) -> Generator[None]:
    """The first SIGINT or SIGTERM asks the run to stop after its step, the second ends it at once."""
    loop, driver = asyncio.get_running_loop(), asyncio.current_task()
    assert driver is not None

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            driver.cancel(f"stopped at once by a second {number.name}")
        stop.set()
        console.note(f"{number.name}: saving after this step; once more ends the run at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
