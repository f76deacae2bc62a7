"""Distributed checkpoints: model, optimizer, schedule and random states in Megatron's format, and the caller's state.

    step-000010/
        trainer.json        what wrote it, and the caller's state
        megatron/           megatron.core.dist_checkpointing; sha256 of every file, checked before anything is read
    latest                  names the newest complete one; written last

Random states are restored where the number of ranks is the same. The data is Megatron's, pickles among it: only
checkpoints whose digests hold are opened, and only those of your own runs should be.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException

from miles_train import folders
from miles_train.errors import CheckpointError
from miles_train.megatron import cpu_shim, resume_fixes, runtime
from miles_train.megatron.upstream import (
    MEGATRON_VERSION,
    ChainedOptimizer,
    CheckpointingException,
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerParamScheduler,
    ShardedObject,
    dist_checkpointing,
    get_cuda_rng_tracker,
    parallel_state,
)

MARKER = "trainer.json"
_DATA = "megatron"
_FORMAT = 1


def save(
    path: Path,
    model: nn.Module,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: Mapping[str, Any],
    keep: int | None = None,
) -> None:
    """Write a checkpoint; collective. It is complete or not there, whenever the process dies.

    Args:
        path: folder to write, the same for all ranks. What is there is replaced, but never the one `latest` names.
        model: unwrapped.
        optimizer: over it.
        scheduler: of the optimizer.
        state: the caller's own, JSON-able.
        keep: how many of the newest checkpoints in path's parent to keep; None keeps all.

    Raises:
        CheckpointError: it could not be written; every rank raises. What `latest` names is untouched.
    """
    header = {
        "format": _FORMAT,
        "megatron_core": MEGATRON_VERSION,
        "world_size": distributed.get_world_size(),
        "optimizer": _kind(optimizer),
        "state": dict(state),
    }

    def begin() -> None:
        # A crash after `publish` and before `point_to` leaves a folder that a resumed run will write again.
        partial = folders.begin(path, replaces=lambda target: not folders.is_latest(target))
        (partial / _DATA).mkdir()
        (partial / MARKER).write_text(json.dumps(header, indent=1), encoding="utf-8")

    def finish() -> None:
        folders.publish(path)
        folders.point_to(path)
        if keep is not None:
            folders.keep_newest(path, keep, MARKER)

    try:
        runtime.on_rank_0(begin)
        resume_fixes.write_without_manager()
        with cpu_shim.active():
            dist_checkpointing.save(
                _contents(model, optimizer, scheduler, saved_ranks=None),
                str(folders.partial_name(path) / _DATA),
                verify_integrity=True,
            )
        runtime.on_rank_0(finish)
    except (OSError, CheckpointException, CheckpointingException) as error:
        raise CheckpointError(
            f"checkpoint {path} could not be written: {_reason(error)}. The folder must be new, its disk writable and "
            "have room. The checkpoints before it are untouched."
        ) from error


def load(
    path: Path, model: nn.Module, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> dict[str, Any]:
    """Read a checkpoint back; collective.

    Args:
        path: its folder, or the folder whose `latest` names it.
        model: unwrapped; of the same shape.
        optimizer: over it.
        scheduler: of the optimizer; continues where the saved one was, with the saved rates.

    Returns:
        The caller's state.

    Raises:
        CheckpointError: there is none, it is damaged (a digest does not hold), or it does not fit.
    """
    folder, header = read_header(path)
    if header["optimizer"] != _kind(optimizer):
        raise CheckpointError(
            f"checkpoint {folder} was written by {header['world_size']} ranks with a {header['optimizer']} optimizer; "
            f"{distributed.get_world_size()} ranks use a {_kind(optimizer)} one. Resume with one rank where it was "
            "one, and with two or more otherwise."
        )
    with cpu_shim.active():
        contents = _contents(model, optimizer, scheduler, saved_ranks=header["world_size"])
        try:
            loaded: Any = dist_checkpointing.load(contents, str(folder / _DATA), verify_integrity=True)
        except (OSError, CheckpointException, CheckpointingException, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {folder} is damaged or does not fit this model: {_reason(error)}. Resume from another one."
            ) from error
        model.load_state_dict(loaded["model"])
        resume_fixes.restore_zero_step(loaded["optimizer"])
        with resume_fixes.tolerate_missing_step(optimizer):
            optimizer.load_state_dict(loaded["optimizer"])
        resume_fixes.separate_steps(optimizer)
        scheduler.num_steps = 0  # load_state_dict adds to it
        scheduler.load_state_dict(loaded["scheduler"])
        if "random" in loaded:
            _set_random_states(loaded["random"])
    return header["state"]


def read_header(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's folder and what trainer.json says, without opening anything else.

    Raises:
        CheckpointError: there is no checkpoint, or it is of another format.
    """
    folder = folders.resolve(path)
    file = None if folder is None else folder / MARKER
    if folder is None or file is None or not file.is_file():
        raise CheckpointError(
            f"there is no checkpoint in {path}: it needs {MARKER}, or `latest` naming a folder with one."
        )
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Resume from another checkpoint.") from None
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{file} has format {header.get('format')}: this version reads {_FORMAT}.")
    return folder, header


def _contents(
    model: Any, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, saved_ranks: int | None
) -> dict[str, Any]:
    """What is saved, or (with the number of ranks that saved it) what is to be loaded."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    metadata = {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    if _kind(optimizer) == "distributed":
        # The only layout that another number of ranks can read.
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    resume_fixes.allocate_state(optimizer)
    sharded = model.sharded_state_dict(metadata=metadata)
    contents = {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading=saved_ranks is not None, metadata=metadata),
        "scheduler": scheduler.state_dict(),
    }
    if saved_ranks in (None, world_size):
        contents["random"] = ShardedObject("random", _random_states(), (world_size,), (rank,), replica_id=0)
    return contents


def _reason(error: BaseException) -> str:
    """What went wrong, in a line; torch's own text is the traceback of every rank."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items()))
    return str(error)


def _kind(optimizer: MegatronOptimizer) -> str:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return "distributed" if any(isinstance(part, DistributedOptimizer) for part in parts) else "plain"


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
