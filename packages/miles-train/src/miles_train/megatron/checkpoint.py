"""Distributed checkpoints: model, optimizer, schedule and random states in Megatron's format, and the caller's state.

    step-000010/
        trainer.json        what wrote it, and the caller's state
        megatron/           megatron.core.dist_checkpointing; sha256 of every file, checked before anything is read
    latest                  names the newest complete one; written last

What lies on disk is the whole model by global names: any layout of ranks reads what any other wrote. Random states are
restored where the layout is the same. The data is Megatron's, pickles among it: only checkpoints whose digests hold are
opened, and only those of your own runs should be.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException

from miles_train import folders
from miles_train.checkpoint_header import MARKER, read_header, write_header
from miles_train.errors import CheckpointError
from miles_train.megatron import cpu_shim, resume_fixes
from miles_train.megatron.background import Background, Outcome, outcome_of_all, run_on_all
from miles_train.megatron.upstream import (
    MEGATRON_VERSION,
    CheckpointingException,
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerParamScheduler,
    ShardedObject,
    dist_checkpointing,
    get_cuda_rng_tracker,
    parallel_state,
    save_integrity_manifest,
)

_DATA = "megatron"
_ERRORS = (OSError, CheckpointException, CheckpointingException)


class Checkpoints:
    """Saves and loads the state of one trainer; at most one save is under way.

    Every method is collective.
    """

    def __init__(self, chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler):
        """Hold what is saved together.

        Args:
            chunks: the rank's model, unwrapped.
            optimizer: over it.
            scheduler: of the optimizer.
        """
        self._chunks, self._optimizer, self._scheduler = chunks, optimizer, scheduler
        self._optimizers = resume_fixes.distributed_parts(optimizer)
        self._save: _Save | None = None

    def save(
        self, path: Path, state: Mapping[str, Any], keep: int | None = None, *, asynchronous: bool = False
    ) -> None:
        """Write a checkpoint. It is complete or not there, whenever the process dies.

        A save that is still under way is waited for first.

        Args:
            path: folder to write, the same for all ranks. What is there is replaced, but never the one `latest` names.
            state: the caller's own, JSON-able.
            keep: how many of the newest checkpoints in path's parent to keep; None keeps all.
            asynchronous: return once everything is copied to memory of the host; `poll` and `wait` finish it.

        Raises:
            CheckpointError: it, or the save before it, could not be written; every rank raises. What `latest` names is
                untouched.
        """
        self.wait()
        self._save = _Save(path, keep)
        try:
            run_on_all(lambda: self._begin(path, state))
            resume_fixes.write_without_manager()
            with cpu_shim.active():
                request: Any = dist_checkpointing.save(
                    self._contents(saved_in=None),
                    str(folders.partial_name(path) / _DATA),
                    async_sharded_save=True,
                    async_strategy="mcore",
                )
                self._save.start(request, copy=asynchronous)
        except _ERRORS as error:
            raise self._given_up(path, error) from error
        except BaseException:
            self._save = None
            raise
        if not asynchronous:
            self.wait()

    def poll(self) -> None:
        """Take a save that is under way a step further, if it got there on every rank; never waits for a disk.

        Raises:
            CheckpointError: it could not be written; every rank raises, once.
        """
        self._advance(wait=False)

    def wait(self) -> None:
        """Wait until a save that is under way is complete.

        Raises:
            CheckpointError: it could not be written; every rank raises, once.
        """
        self._advance(wait=True)

    def _advance(self, wait: bool) -> None:
        while (save := self._save) is not None:
            try:
                with cpu_shim.active():
                    went_on = save.advance(wait)
            except _ERRORS as error:
                raise self._given_up(save.path, error) from error
            if not went_on:
                return
            if save.is_complete:
                self._save = None

    def _given_up(self, path: Path, error: BaseException) -> CheckpointError:
        self._save = None
        if distributed.get_rank() == 0:
            folders.discard(path)
        return CheckpointError(
            f"checkpoint {path} could not be written: {_reason(error)}. The folder must be new, its disk writable and "
            "have room. The checkpoints before it are untouched."
        )

    def load(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint back, written by any layout of ranks.

        Args:
            path: its folder, or the folder whose `latest` names it.

        Returns:
            The caller's state.

        Raises:
            CheckpointError: there is none, it is damaged (a digest does not hold), or it does not fit.
        """
        self.wait()
        header = read_header(path)
        with cpu_shim.active():
            try:
                loaded: Any = dist_checkpointing.load(
                    self._contents(saved_in=header.layout), str(header.folder / _DATA), verify_integrity=True
                )
            except (*_ERRORS, ValueError) as error:
                raise CheckpointError(
                    f"checkpoint {header.folder} is damaged or does not fit this model: {_reason(error)}. Resume from "
                    "another one."
                ) from error
            for name, chunk in self._named_chunks():
                chunk.load_state_dict(loaded[name])
            self._load_optimizer(loaded["optimizer"], loaded["updates"])
            self._scheduler.num_steps = 0  # load_state_dict adds to it
            self._scheduler.load_state_dict(loaded["scheduler"])
            if "random" in loaded:
                _set_random_states(loaded["random"])
        return header.state

    def _load_optimizer(self, tensors: Mapping[str, Any], updates: int) -> None:
        with resume_fixes.tolerate_missing_step(self._optimizer):
            for number, part in enumerate(self._optimizers):
                state = part.state_dict()
                for group in state["optimizer"]["param_groups"]:
                    group["step"] = updates
                sharding = {"param_state": tensors[str(number)], "param_state_sharding_type": "fully_reshardable"}
                part.load_state_dict({**state, **sharding})
        resume_fixes.separate_steps(self._optimizer)

    def _begin(self, path: Path, state: Mapping[str, Any]) -> None:
        if distributed.get_rank() != 0:
            return
        # A crash after `publish` and before `point_to` leaves a folder that a resumed run will write again.
        partial = folders.begin(path, replaces=lambda target: not folders.is_latest(target))
        (partial / _DATA).mkdir()
        write_header(partial, _layout(), state, f"megatron-core {MEGATRON_VERSION}")

    def _contents(self, saved_in: Mapping[str, int] | None) -> dict[str, Any]:
        """What is saved, or (with the layout that saved it) what is to be loaded."""
        metadata = {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            # By number, not stacked over all layers: layers of one model may differ.
            "non_homogeneous_layers": True,
            # The only layout of the optimizer's state that other layouts of ranks can read.
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        resume_fixes.allocate_state(self._optimizer)
        contents: dict[str, Any] = {
            name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in self._named_chunks()
        }
        # What else Megatron would save of the optimizer has the saving layout's shape (how many parts it has, and which
        # groups of parameters rank 0 holds), and is known here anyway but for the number of updates.
        contents["optimizer"] = {
            str(number): part.sharded_state_dict(contents, is_loading=saved_in is not None, metadata=metadata)[
                "param_state"
            ]
            for number, part in enumerate(self._optimizers)
        }
        contents["updates"] = _updates(self._optimizers)
        contents["scheduler"] = self._scheduler.state_dict()
        if saved_in in (None, _layout()):
            rank, world_size = distributed.get_rank(), distributed.get_world_size()
            contents["random"] = ShardedObject("random", _random_states(), (world_size,), (rank,), replica_id=0)
        return contents

    def _named_chunks(self) -> list[tuple[str, Any]]:
        return [(f"model{number}", chunk) for number, chunk in enumerate(self._chunks)]


class _Save:
    """One save: tensors are written on every rank; then rank 0 takes digests and gives the folder its name."""

    def __init__(self, path: Path, keep: int | None):
        self.path, self._keep = path, keep
        self.is_complete = False
        self._finalize: list[Any] = []
        self._work = Background()

    def start(self, request: Any, *, copy: bool) -> None:
        """Begin to write what Megatron planned, from a copy where the model goes on to change."""
        self._finalize = list(request.finalize_fns)
        if request.async_fn is None:
            return  # this rank has nothing to write
        _, buckets, results = request.async_fn_args
        if request.preload_fn is not None:
            buckets = request.preload_fn()
        if copy:
            for _, _, (_, tensors) in buckets:
                for index, (item, tensor) in enumerate(tensors):
                    tensors[index] = item, tensor.clone()
        transforms = request.async_fn.args[0]
        self._work = Background(lambda: results.put(resume_fixes.write_buckets(transforms, buckets)))

    def advance(self, wait: bool) -> bool:
        """Go on to what comes next; False if it is too early for that."""
        outcome, reason = outcome_of_all(self._work, wait)
        if outcome is Outcome.FAILED:
            raise OSError(reason)
        if outcome is Outcome.RUNNING:
            return False
        if not self._finalize:
            self.is_complete = True
            return True
        # Collective: what each rank wrote goes into the checkpoint's metadata.
        for finalize in self._finalize:
            finalize()
        self._finalize = []
        self._work = Background(self._publish if distributed.get_rank() == 0 else None)
        return True

    def _publish(self) -> None:
        save_integrity_manifest(str(folders.partial_name(self.path) / _DATA))
        folders.publish(self.path)
        folders.point_to(self.path)
        if self._keep is not None:
            folders.keep_newest(self.path, self._keep, MARKER)


def _reason(error: BaseException) -> str:
    """What went wrong, in a line; torch's own text is the traceback of every rank."""
    if isinstance(error, CheckpointException) and error.failures:
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
    return str(error)


def _layout() -> dict[str, int]:
    state = parallel_state
    return {
        "world_size": distributed.get_world_size(),
        "tensor_model_parallel_size": state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context_parallel_size": state.get_context_parallel_world_size(),
        "expert_model_parallel_size": state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": state.get_expert_tensor_parallel_world_size() or 1,
    }


def _updates(optimizers: Sequence[DistributedOptimizer]) -> int:
    groups = [group for part in optimizers for group in part.state_dict()["optimizer"]["param_groups"]]
    return max((int(group.get("step", 0)) for group in groups), default=0)


def _random_states() -> dict[str, Any]:
    """Random states of this rank, of plain types and tensors (the checkpoint is read with weights_only)."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "model_parallel": _tracker().get_states(),
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.cuda.set_rng_state(states["cuda"])
    torch.set_rng_state(states["torch"])
    _tracker().set_states(states["model_parallel"])


def _tracker() -> Any:
    """Megatron's named random states, one of them for what differs between model-parallel ranks."""
    return get_cuda_rng_tracker()
