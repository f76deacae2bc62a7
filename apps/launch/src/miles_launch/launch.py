"""`miles run`: check, run, and say what happened."""

import contextlib
import errno
from collections.abc import Generator
from pathlib import Path

from miles_core import InputError, Interrupted, Recipe
from miles_core.observe import Console, Sink, read_metrics
from miles_core.observe.plot import plot_rewards
from miles_core.observe.sinks import open_sinks
from miles_launch.doctor import refuse_unfit_machine
from miles_launch.prepare import prepare
from miles_launch.run import Checkpoint, run
from miles_launch.rundir import RunDir, find_run, new_run
from miles_train.checkpoint_header import read_header
from miles_train.folders import resolve


def launch(recipe: Recipe, *, resume: bool, runs: Path) -> None:
    """Run a recipe from its checks to the exported model.

    Args:
        recipe: what to run.
        resume: go on with the newest run of the recipe's name instead of starting one.
        runs: folder that holds the folders of runs.

    Raises:
        MilesError: whatever ended it; what was done so far is on disk.
    """
    warnings = refuse_unfit_machine(runs, ports_of(recipe))
    prepared = prepare(recipe)
    run_dir = find_run(runs, recipe) if resume else new_run(runs, recipe)
    checkpoint = _checkpoint(run_dir) if resume else Checkpoint()
    with Console(recipe.train.steps, checkpoint.step) as console:
        for warning in warnings:
            console.note(f"warning: {warning.name} is {warning.value}, should be {warning.rule}. {warning.way_out}")
        _announce(console, recipe, run_dir, checkpoint)
        with _ending(console, recipe, run_dir):
            run(prepared, run_dir, checkpoint, console, _sinks(recipe, run_dir))


def ports_of(recipe: Recipe) -> dict[str, int]:
    """Loopback ports that a run listens on, by the recipe key that sets them."""
    joins_a_cluster = bool(recipe.cluster.address)
    return {"cluster.dashboard_port": 0 if joins_a_cluster else recipe.cluster.dashboard_port}


def _sinks(recipe: Recipe, run_dir: RunDir) -> list[Sink]:
    try:
        return open_sinks(recipe.observe, run_dir.path, run_dir.path.name, recipe.model_dump(mode="json"))
    except ImportError as error:
        raise InputError("observe", recipe.observe.model_dump(), str(error), "Or switch that sink off.") from None


def _checkpoint(run_dir: RunDir) -> Checkpoint:
    """Where to go on; a run that died before its first checkpoint starts again from the beginning."""
    path = resolve(run_dir.checkpoints) if (run_dir.checkpoints / "latest").is_file() else None
    if path is None:
        return Checkpoint()
    state = read_header(path).state
    return Checkpoint(path, state["step"], state["weight_version"], state["cursor"])


def _announce(console: Console, recipe: Recipe, run_dir: RunDir, checkpoint: Checkpoint) -> None:
    if recipe.controls.shuffle_rewards:
        console.banner("controls.shuffle_rewards: rewards are permuted among all samples, this run must not learn")
    if recipe.controls.freeze_engine:
        console.banner("controls.freeze_engine: weights are never pushed, the engine serves version 0 for ever")
    where = f"resuming {run_dir.path} at step {checkpoint.step}" if checkpoint.step else f"run {run_dir.path}"
    console.note(
        f"{where}: {recipe.train.steps} steps of {recipe.rollout.prompts_per_step} prompts × "
        f"{recipe.rollout.group_size} samples, model {recipe.model.path}"
    )


@contextlib.contextmanager
def _ending(console: Console, recipe: Recipe, run_dir: RunDir) -> Generator[None]:
    """Whatever ends the run, plot what there is and say how to go on."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Interrupted):
            console.note(f"go on with the same command and --resume; so far: {run_dir.path}")
        else:
            console.note(
                f"what was done so far is in {run_dir.path} (logs of every process in {run_dir.logs}); "
                "--resume goes on from the last checkpoint"
            )
        with contextlib.suppress(OSError):  # the disk may be what ended it
            _plot(run_dir, recipe)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                "disk of runs", str(run_dir.path), f"must have room ({error.strerror})", "Free some, then --resume."
            ) from error
        raise
    _plot(run_dir, recipe)
    for line in _summary(run_dir):
        console.note(line)


def _plot(run_dir: RunDir, recipe: Recipe) -> None:
    records = read_metrics(run_dir.metrics) if run_dir.metrics.exists() else []
    if records:
        plot_rewards(records, run_dir.plot, recipe.name)


def _summary(run_dir: RunDir) -> list[str]:
    """Three lines: what was learned, where it is, what to try next."""
    records = read_metrics(run_dir.metrics)
    window = max(1, min(5, len(records) // 2))
    first, last = (
        sum(record["rollout/reward"] for record in part) / len(part) for part in (records[:window], records[-window:])
    )
    seconds = sum(record["perf/time/step"] for record in records)
    return [
        f"reward {first:.3f} -> {last:.3f} in {len(records)} steps, {seconds:.0f} s (means of {window} steps)",
        f"model {run_dir.export}, curve {run_dir.plot}, samples {run_dir.samples}, metrics {run_dir.metrics}",
        "next: the controls must not learn (--set controls.shuffle_rewards=true), other seeds must (--set seed=1)",
    ]
