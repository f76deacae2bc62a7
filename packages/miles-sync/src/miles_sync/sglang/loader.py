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
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from miles_sync.channel import Deadline, dial
from miles_sync.errors import MismatchError, SyncError
from miles_sync.manifest import Manifest
from miles_sync.messages import Commit, Mode, Prepare
from miles_sync.plan import BoundPlan, bind
from miles_sync.receivers import Pieces, fingerprint
from miles_sync.rehearsal import record
from miles_sync.sglang.command import Attend, Idle, Order, opened
from miles_sync.sglang.target import TESTED_VERSION, TOKEN_VARIABLE
from miles_sync.staging import MAX_DEADLINE_S, Staging

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
            name = "engine" if receiver.ranks == 1 else f"engine, rank {receiver.rank} of {receiver.ranks}"
            staging = _stagings[model] = Staging(receiver, name, remote_orders=True)
        match opened(named_tensors[0][0]):
            case Attend() as attend:
                threading.Thread(target=_attend, args=(staging, attend), name="miles-sync", daemon=True).start()
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


def _attend(staging: Staging, attend: Attend) -> None:
    """Connect to a sender and answer it until it goes."""
    deadline_s = min(max(attend.deadline_s, 1.0), MAX_DEADLINE_S)
    token = os.environ.get(TOKEN_VARIABLE, "")
    try:
        # Without a token the handshake fails on the sender's side, and is named there.
        channel = dial(attend.host, attend.port, token, Deadline(deadline_s), f"{attend.host}:{attend.port}")
    except SyncError as error:
        _log.error("miles-sync: no connection to the sender (is %s set?): %s", TOKEN_VARIABLE, error)
        return
    staging.serve(channel, deadline_s)


class SGLangReceiver:
    """The live weights of one rank of an engine, changed by a copy plan recorded from the model's own loader.

    Attributes:
        device: Of the weights.
        exact: False: the engine's parameters are fused, sliced and padded.
        rank: This process among the engine's tensor-parallel ranks.
        ranks: How many there are.
    """

    exact = False

    def __init__(self, model: torch.nn.Module) -> None:
        """Receive into `model`, without keeping it alive."""
        self._ref = weakref.ref(model)
        self._bound: BoundPlan | None = None
        self.device = next(model.parameters()).device
        self.rank, self.ranks = _tensor_parallel()

    @property
    def _model(self) -> torch.nn.Module:
        model = self._ref()
        if model is None:
            raise MismatchError("the engine has dropped its model", stage="begin")
        return model

    def check(self, manifest: Manifest) -> None:
        """Record the plan, writing nothing; raise `MismatchError` unless it writes every weight.

        Must run on the main loop.
        """
        self._check_engine()
        plan = record(self._model, manifest, sliced=self.ranks > 1)
        if plan.through_loader:
            reasons = sorted(plan.through_loader.items())
            _log.info("miles-sync: %d tensors go through the model's own loader, as %s", len(reasons), reasons[0])
        self._bound = bind(plan, manifest, self._model)

    def begin(self, manifest: Manifest, mode: Mode) -> None:
        """Get ready for the pieces of a manifest that was checked."""
        if self._bound is None or self._bound.plan.layout != manifest.layout_id():
            raise MismatchError("this layout was not checked", stage="begin")
        if self.device.type == "cuda":
            # The engine overlaps: when its main loop comes here, or says that it is paused, its last batch may still
            # run on another stream.
            torch.cuda.synchronize(self.device)
        self._bound.begin()

    def install(self, pieces: Pieces) -> None:
        """Write pieces where the plan says."""
        assert self._bound is not None
        self._bound.install(pieces)

    def commit(self, version: int) -> None:
        """Have the model derive what it derives from its weights. Must run on the main loop."""
        assert self._bound is not None
        self._bound.finish()

    def abandon(self) -> None:
        """Nothing to undo: the next transaction writes every weight."""

    def fingerprint(self) -> Callable[[], str]:
        """Start digesting the live parameters, as the engine lays them out."""
        return fingerprint({n: p.detach() for n, p in self._model.named_parameters()})

    def _check_engine(self) -> None:
        version = importlib.metadata.version("sglang")
        if version != TESTED_VERSION:
            raise MismatchError(
                f"SGLang {version} is not {TESTED_VERSION}, which this release is tested with",
                stage="begin",
            )
        if getattr(self._model, "quant_config", None) is not None:
            raise MismatchError(
                "the model is quantised: its loaded weights are repacked and cannot be loaded over",
                stage="begin",
            )
        # On a CPU with AMX the engine packs weights into tiles after loading; writing plain rows over them would
        # serve garbage without an error.
        if any(getattr(m, "use_intel_amx_backend", False) for m in self._model.modules()):
            raise MismatchError("the engine packed its weights for AMX: they cannot be loaded over", stage="begin")


def _tensor_parallel() -> tuple[int, int]:
    """This process' tensor-parallel rank, and how many ranks there are."""
    if "sglang.srt.distributed.parallel_state" not in sys.modules:
        return 0, 1  # no engine runs in this process
    from sglang.srt.distributed import parallel_state  # noqa: PLC0415 - see above: 15 s where no engine runs

    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
