"""The engine's half: what `--custom-weight-loader` names, and the weights of an SGLang model as a receiver.

The engine calls `load(model, named_tensors)` from its scheduler's main loop, between batches. What a loader
returns is discarded and what it raises ends the engine
(`sglang/srt/model_executor/model_runner_components/weight_updater.py`), so `load` raises nothing and answers
over the control channel, which a thread of its own keeps open to the sender.

Each tensor-parallel rank is a process with a main loop of its own, is told a command of its own and keeps a connection
of its own: to the sender it is a target like any other, but that all ranks commit in one request, between the same two
batches. In staged mode weights move into staging on the rank's thread while the engine
generates, and a commit, on the main loop, writes them. In place, they are written as they arrive: generation must be
paused from before the first bucket until the commit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import sys
import weakref
from collections.abc import Sequence

import torch

from miles_sync.errors import MismatchError
from miles_sync.messages import Commit, Prepare
from miles_sync.planned import PlannedReceiver, attend
from miles_sync.sglang.command import Attend, Idle, Order, opened
from miles_sync.sglang.target import TESTED_VERSION
from miles_sync.staging import Staging

# Looked for, not imported: the engine has imported itself, and elsewhere that takes 15 s.
if importlib.util.find_spec("sglang") is None:
    raise ImportError('miles_sync.sglang.loader runs inside an SGLang engine: pip install "miles-sync[sglang]"')

_log = logging.getLogger(__name__)

# The engine gives a loader nothing to keep state in, and calls it by import path: the model is the key.
_stagings: weakref.WeakKeyDictionary[torch.nn.Module, Staging] = weakref.WeakKeyDictionary()


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Carry out one command of a sender (see `miles_sync.sglang.command`). Never raises.

    Args:
        model: The engine's model.
        named_tensors: One pair whose name is the command.
    """
    try:
        if len(named_tensors) != 1:
            raise ValueError(f"{len(named_tensors)} tensors where one command was due")
        staging = _stagings.get(model)
        if staging is None:
            receiver = SGLangReceiver(model)
            staging = _stagings[model] = Staging(receiver, receiver.name, remote_orders=True)
        match opened(named_tensors[0][0]):
            case Attend(host=host, port=port, deadline_s=deadline_s):
                attend(staging, host, port, deadline_s)
            case Order(what="prepare", txn=txn):
                staging.order(Prepare(txn))
            case Order(what="commit", txn=txn):
                staging.order(Commit(txn))
            case Idle():
                pass
            case order:
                raise ValueError(f"unknown order {order}")
    except Exception:  # noqa: BLE001 - an exception here would end the engine
        _log.exception("miles-sync: a command was not carried out; the weights are unchanged")


class SGLangReceiver(PlannedReceiver):
    """The live weights of one rank of an engine, changed by a copy plan recorded from the model's own loader."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Receive into `model`, without keeping it alive."""
        super().__init__(model, *_tensor_parallel())

    def check_engine(self) -> None:
        """Raise `MismatchError` for another release, and for weights that were packed after they were loaded."""
        version = importlib.metadata.version("sglang")
        if version != TESTED_VERSION:
            raise MismatchError(
                f"SGLang {version} is not {TESTED_VERSION}, which this release is tested with",
                stage="begin",
            )
        if getattr(self.model, "quant_config", None) is not None:
            raise MismatchError(
                "the model is quantised: its loaded weights are repacked and cannot be loaded over",
                stage="begin",
            )
        # On a CPU with AMX the engine packs weights into tiles after loading; writing plain rows over them would
        # serve garbage without an error.
        if any(getattr(m, "use_intel_amx_backend", False) for m in self.model.modules()):
            raise MismatchError("the engine packed its weights for AMX: they cannot be loaded over", stage="begin")


def _tensor_parallel() -> tuple[int, int]:
    """This process' tensor-parallel rank, and how many ranks there are."""
    if "sglang.srt.distributed.parallel_state" not in sys.modules:
        return 0, 1  # no engine runs in this process
    from sglang.srt.distributed import parallel_state  # noqa: PLC0415 - see above: 15 s where no engine runs

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
