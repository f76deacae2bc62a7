"""What runs inside the actors of a run: the rooms, composed. Plain classes; the driver names them by dotted path.

Each process imports only its own engine, inside its methods' room: importing this module imports none.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from miles_core import Batch, Prompt, Recipe
from miles_core.cluster.actors import Member
from miles_launch.loading import decode_fp8, loading_bar
from miles_launch.prepare import TRAINER_HOOKS, WORKER_HOOKS, optional_hook

if TYPE_CHECKING:
    from miles_rollout.rewards import Judge
    from miles_rollout.sglang import EngineAddress
    from miles_rollout.worker import RolloutWorker
    from miles_sync import WeightSync

ENGINE_WATCH_S = 0.5  # between looks at the engine's processes


class EngineActor:
    """Holds one SGLang server."""

    def __init__(self, recipe: Recipe, model_path: str, log_path: str):
        """Start the server and wait until it serves."""
        from miles_rollout.sglang import ServerSettings, SGLangServer  # noqa: PLC0415 (its own process alone)
        from miles_sync.sglang import LOADER  # noqa: PLC0415

        settings = ServerSettings(
            model_path=model_path,
            log_path=Path(log_path),
            arguments=recipe.rollout.sglang,
            deterministic=recipe.deterministic,
            seed=recipe.seed,
            custom_weight_loaders=(LOADER,),
            start_deadline_s=recipe.cluster.start_deadline_s,
        )
        self._server: SGLangServer = SGLangServer(settings)
        self._server.start()

    def address(self) -> "EngineAddress":
        """Where clients find it, with its keys."""
        return self._server.address

    def watch(self) -> str:
        """Return, once the engine or one of its processes is dead, which and why."""
        from miles_rollout.errors import EngineDied  # noqa: PLC0415

        while True:
            try:
                self._server.check()
            except EngineDied as error:
                return str(error)
            time.sleep(ENGINE_WATCH_S)

    def close(self) -> None:
        """End the server with all its processes."""
        self._server.stop()


@dataclass(frozen=True, slots=True)
class Made:
    """What a call of `roll_out` put into the queue, and what it could not.

    Attributes:
        num_groups: put.
        dropped: reason to count.
        metrics: of the worker.
    """

    num_groups: int
    dropped: Mapping[str, int]
    metrics: Mapping[str, float]


class WorkerActor:
    """Runs the rollout worker; puts what it makes into the queue."""

    def __init__(self, recipe: Recipe, model_path: str):
        """Load the tokenizer and user code."""
        from miles_rollout.tokenizer import Tokenizer  # noqa: PLC0415

        self._recipe = recipe
        self._tokenizer = Tokenizer(model_path)
        hooks = {kind: optional_hook(recipe.hooks, kind) for kind in WORKER_HOOKS}
        self._hooks = {kind: code for kind, code in hooks.items() if code is not None}
        self._judge = _judge(recipe)
        self._worker: RolloutWorker | None = None
        self._queue: Member | None = None

    async def start(self) -> None:
        """Start the reward processes: a reward that cannot be loaded there is an error before anything is generated."""
        await self._judge.start()

    def connect(self, address: "EngineAddress", queue: Member) -> None:
        """Learn where the engine and the queue are."""
        from miles_rollout.engine import SamplingParams  # noqa: PLC0415
        from miles_rollout.generate import GenerateContext  # noqa: PLC0415
        from miles_rollout.sglang import SGLangEngine  # noqa: PLC0415
        from miles_rollout.worker import RolloutWorker, WorkerSettings  # noqa: PLC0415

        rollout = self._recipe.rollout
        engine = SGLangEngine(address, max_retries=rollout.max_retries, request_deadline_s=rollout.request_deadline_s)
        sampling = SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, stop_token_ids=self._tokenizer.stop_token_ids
        )
        context = GenerateContext(engine, self._tokenizer, sampling, weight_version=0)
        settings = WorkerSettings(rollout.group_size, self._recipe.seed, rollout.deadline_s)
        self._worker = RolloutWorker(context, self._judge, settings, **self._hooks)
        self._queue = queue

    async def roll_out(self, step: int, weight_version: int, prompts: Sequence[Prompt]) -> Made:
        """Make the groups of a step and put those that the filters keep into the queue."""
        assert self._worker is not None and self._queue is not None
        made = await self._worker.rollout(prompts, step=step, weight_version=weight_version)
        await self._queue.ask("put", made.groups)
        return Made(
            len(made.groups),
            made.dropped_reasons,
            {"perf/time/generate/engine": made.generate_s, "perf/time/generate/reward": made.reward_s},
        )

    async def close(self) -> None:
        """End the reward processes and let go of connections."""
        if self._worker is not None:
            await self._worker.close()
        else:
            await self._judge.close()


def _judge(recipe: Recipe) -> "Judge":
    from miles_rollout.rewards import make_group_judge, make_judge  # noqa: PLC0415 (the worker's process alone)

    if recipe.hooks.reward is not None:
        return make_judge(recipe.hooks.reward, recipe.reward)
    assert recipe.hooks.group_reward is not None  # one of the two, by the recipe's own rule
    return make_group_judge(recipe.hooks.group_reward, recipe.reward)


class TrainerActor:
    """One trainer rank with its model; rank 0 also pushes the weights."""

    def __init__(
        self,
        recipe: Recipe,
        model_path: str,
        rank: int,
        master_port: int,
        run_path: str,
        resume_from: Path | None,
        sync_token: str,
    ):
        """Build the model with its weights, or continue from a checkpoint."""
        from miles_core.algorithms.losses.build import build_loss  # noqa: PLC0415 (its own process alone)
        from miles_train.megatron.runtime import Address  # noqa: PLC0415 (its own process alone)
        from miles_train.megatron.trainer import Hooks, MegatronTrainer  # noqa: PLC0415

        self._recipe, self._rank, self._run_path, self._sync_token = recipe, rank, Path(run_path), sync_token
        hooks = {kind: optional_hook(recipe.hooks, kind) for kind in TRAINER_HOOKS}
        with loading_bar(rank) as progress:
            self._trainer = MegatronTrainer(
                model_path,
                recipe.train.megatron,
                build_loss(recipe.algorithm),
                address=Address(rank, recipe.train.num_ranks, master_port=master_port),
                seed=recipe.seed,
                micro_batch_tokens=recipe.train.micro_batch_tokens,
                temperature=recipe.rollout.temperature,
                deterministic=recipe.deterministic,
                hooks=Hooks(**hooks),
                family=recipe.model.family,
                decode=decode_fp8,
                progress=progress,
            )
        if resume_from is not None:
            self._trainer.load(resume_from)
        self._sync: WeightSync | None = None

    def connect(self, engines: Sequence["EngineAddress"]) -> None:
        """Learn where the engines are."""
        from miles_sync import WeightSync  # noqa: PLC0415
        from miles_sync.sglang import SGLangTarget  # noqa: PLC0415

        if self._rank == 0:
            targets = [
                SGLangTarget(e.url, api_key=e.api_key, admin_api_key=e.admin_api_key, name=e.name) for e in engines
            ]
            sync = self._recipe.sync
            self._sync = WeightSync(
                targets, token=self._sync_token, transport=sync.transport, deadline_s=sync.deadline_s
            )

    def step(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """Update once per minibatch; metrics under train/."""
        return {f"train/{name}": value for name, value in self._trainer.step(minibatches).items()}

    def push(self, weight_version: int) -> dict[str, float]:
        """Push the weights to all engines (rank 0) and check that each serves the version it was sent."""
        if self._sync is None:
            for _ in self._trainer.weights():
                pass  # collective: where ranks share the model, rank 0 has its tensors from all of them
            return {}
        report = self._sync.push(self._trainer.weights(), weight_version)
        times = {f"perf/time/sync/{stage}": seconds for stage, seconds in report.seconds.items()}
        return {"sync/bytes": report.nbytes, "sync/version": report.version, "sync/gb_per_s": report.gb_per_s, **times}

    def save(self, step: int, state: Mapping[str, object]) -> str:
        """Write a checkpoint of the state after `step` steps."""
        path = self._run_path / "checkpoints" / f"step={step:06d}"
        self._trainer.save(path, state, keep=self._recipe.train.keep_checkpoints)
        return str(path)

    def export(self) -> str:
        """Write the model as a Hugging Face directory and read it back."""
        path = self._run_path / "hf"
        self._trainer.export(path)
        return str(path)

    def close(self) -> None:
        """Let go of the engines and of the other ranks."""
        if self._sync is not None:
            self._sync.close()
        self._trainer.close()
