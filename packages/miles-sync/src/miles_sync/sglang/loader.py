"""The engine's half: what `--custom-weight-loader` names, and the weights of an SGLang model as a receiver.

The engine calls `load(model, named_tensors)` from its scheduler's main loop, between batches. What a loader
returns is discarded and what it raises ends the engine
(`sglang/srt/model_executor/model_runner_components/weight_updater.py`), so `load` raises nothing and answers
over the control channel, which a thread of its own keeps open to the sender. Weights move into staging on that
thread, while the engine generates; only a commit, on the main loop, touches the model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence

import torch

from miles_sync.channel import Deadline, dial
from miles_sync.errors import MismatchError, SyncError
from miles_sync.messages import Commit, Prepare
from miles_sync.receivers import fingerprint, listed
from miles_sync.rehearsal import rehearse
from miles_sync.sglang.command import Attend, Order, opened
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
            staging = Staging(SGLangReceiver(model), "engine", remote_orders=True)
            _stagings[model] = staging
        match opened(named_tensors[0][0]):
            case Attend() as attend:
                threading.Thread(target=_attend, args=(staging, attend), name="miles-sync", daemon=True).start()
            case Order(what="prepare", txn=txn):
                staging.order(Prepare(txn))
            case Order(what="commit", txn=txn):
                staging.order(Commit(txn))
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
    """The live weights of an engine's model, changed by the model's own `load_weights`."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Receive into `model`, without keeping it alive."""
        self._ref = weakref.ref(model)

    @property
    def _model(self) -> torch.nn.Module:
        model = self._ref()
        if model is None:
            raise MismatchError("the engine has dropped its model", stage="begin")
        return model

    def check(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Rehearse `load_weights` without writing; raise `MismatchError` unless it would write every weight.

        Must run where `load` runs.
        """
        self._check_engine()
        rehearsal = rehearse(self._model, staged)
        if rehearsal.ignored or rehearsal.unwritten:
            faults = [
                f"{what}: {listed(names)}"
                for what, names in (
                    ("the model takes no such tensor", rehearsal.ignored),
                    ("no tensor writes (all of) the parameter", rehearsal.unwritten),
                )
                if names
            ]
            raise MismatchError("; ".join(faults), stage="begin")

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Write the staged tensors through the model's own loader."""
        self._model.load_weights(list(staged.items()))  # type: ignore[operator]

    def fingerprint(self) -> str:
        """Digest of the live parameters, as the engine lays them out (fused, padded)."""
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
