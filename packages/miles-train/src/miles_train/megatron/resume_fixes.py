"""What saving and resuming need of megatron-core 0.19.2 without Transformer Engine and Apex.

Without them Megatron's Adam is torch's AdamW, which keeps `step` in the state of every parameter; the checkpoint code
of `DistributedOptimizer` was written for optimizers that keep it in the group. Three fixes:

1. `allocate_state`: state exists before the first update, else `state_dict` finds no step and fails, on saving as on
   loading.
2. `tolerate_missing_step`: checkpoints carry no per-parameter `step`, which `_set_main_param_and_optimizer_states`
   would look up and copy, into leaves that require gradients.
3. `separate_steps`: loading gives all parameters one `step` tensor, which AdamW then advances once per parameter.
   Without this fix nothing fails: the run resumes and computes other numbers.

And two for saving: `write_without_manager` and `write_buckets`.
"""

import queue
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from miles_train.megatron.upstream import (
    ChainedOptimizer,
    DistributedOptimizer,
    MegatronOptimizer,
    filesystem_async,
)


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter the state that AdamW would give it at its first update: zeros."""
    for inner in _inner(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                if isinstance(inner, torch.optim.AdamW):  # Transformer Engine's Adam counts in the group
                    state.setdefault("step", torch.tensor(0.0))
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


@contextmanager
def tolerate_missing_step(optimizer: MegatronOptimizer) -> Iterator[None]:
    """A context to load optimizer state in."""
    changed = distributed_parts(optimizer)
    for part in changed:
        part._set_main_param_and_optimizer_states = MethodType(_set_states, part)
    try:
        yield
    finally:
        for part in changed:
            del part._set_main_param_and_optimizer_states


@torch.no_grad()
def _set_states(self: DistributedOptimizer, model_param: Tensor, tensors: dict[str, Any]) -> None:
    # A missing step stays what load_state_dict took from the group; strings are left alone by the method.
    DistributedOptimizer._set_main_param_and_optimizer_states(self, model_param, {"step": "kept", **tensors})


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a `step` tensor of its own."""
    for inner in _inner(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


def write_without_manager() -> None:
    """Let Megatron's checkpoint writer hand its results over a queue in this process.

    It saves with threads, but makes its queue by starting a manager process (start method spawn): seconds per save, and
    an EOFError in every script whose main module is not guarded. A saver that waits for its own threads needs neither.
    """
    filesystem_async._results_queue = queue.Queue()


def write_buckets(transforms: list[Any], buckets: Sequence[Any]) -> dict[int, list[Any]]:
    """Write what a save planned, in this thread, as `write_preloaded_data_multithread` does.

    That function keeps an error in a cycle with the frames it came through, and one of them holds a view of a BytesIO:
    on a full disk Python 3.12.1 dies of collecting it (https://github.com/python/cpython/issues/111049).

    Args:
        transforms: of the writer.
        buckets: of the writer, staged in the host's memory.

    Returns:
        What was written, by bucket.

    Raises:
        OSError: a file could not be written.
    """
    written: dict[int, list[Any]] = {}
    for number, bucket in enumerate(buckets):
        made: Any = filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, results_queue=None, count_queue=None, use_fsync=True
        )
        outcome = made[1]
        if isinstance(outcome, Exception):
            traceback.clear_frames(outcome.__traceback__)
            raise OSError(f"{bucket[1]}: {outcome}")
        written[number] = outcome
    return written


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers of this rank: one, or one more for experts that are divided among ranks."""
    return [part for part in _parts(optimizer) if isinstance(part, DistributedOptimizer)]


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _inner(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer)]
