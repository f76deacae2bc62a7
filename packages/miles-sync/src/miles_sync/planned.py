"""The weights of an engine's model as a receiver, changed by a copy plan recorded from the model's own loader."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable

import torch

from miles_sync.channel import TOKEN_VARIABLE, Deadline, dial
from miles_sync.errors import MismatchError, SyncError
from miles_sync.manifest import Manifest
from miles_sync.messages import Mode
from miles_sync.plan import BoundPlan, bind
from miles_sync.receivers import Pieces, fingerprint
from miles_sync.rehearsal import record
from miles_sync.staging import MAX_DEADLINE_S, Staging

_log = logging.getLogger(__name__)


class PlannedReceiver:
    """One rank of an engine: a model with a `load_weights` of its own, whose parameters are fused, sliced and padded.

    Attributes:
        device: Of the weights.
        exact: False: the live parameters are not the manifest's tensors.
        rank: This process among the engine's tensor-parallel ranks.
        ranks: How many there are.
    """

    exact = False

    def __init__(self, model: torch.nn.Module, rank: int, ranks: int) -> None:
        """Receive into `model`, without keeping it alive."""
        self._ref = weakref.ref(model)
        self._bound: BoundPlan | None = None
        self.device = next(model.parameters()).device
        self.rank, self.ranks = rank, ranks

    @property
    def name(self) -> str:
        """For messages."""
        return "engine" if self.ranks == 1 else f"engine, rank {self.rank} of {self.ranks}"

    @property
    def model(self) -> torch.nn.Module:
        """The engine's. Raises `MismatchError` where it has dropped it."""
        model = self._ref()
        if model is None:
            raise MismatchError("the engine has dropped its model", stage="begin")
        return model

    def check_engine(self) -> None:
        """Raise `MismatchError` for an engine whose weights cannot be loaded over. Called before a plan is recorded."""

    def check(self, manifest: Manifest) -> None:
        """Record the plan, writing nothing; raise `MismatchError` unless it writes every weight.

        Must run on the main loop.
        """
        self.check_engine()
        plan = record(self.model, manifest, sliced=self.ranks > 1)
        if plan.through_loader:
            reasons = sorted(plan.through_loader.items())
            _log.info("miles-sync: %d tensors go through the model's own loader, as %s", len(reasons), reasons[0])
        self._bound = bind(plan, manifest, self.model)

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
        return fingerprint({n: p.detach() for n, p in self.model.named_parameters()})


def attend(staging: Staging, host: str, port: int, deadline_s: float) -> None:
    """On a thread of its own, connect to a sender with the token of the environment, and answer it until it goes."""

    def run() -> None:
        token, deadline = os.environ.get(TOKEN_VARIABLE, ""), min(max(deadline_s, 1.0), MAX_DEADLINE_S)
        try:
            # Without a token the handshake fails on the sender's side, and is named there.
            channel = dial(host, port, token, Deadline(deadline), f"{host}:{port}")
        except SyncError as error:
            _log.error("miles-sync: no connection to the sender (is %s set?): %s", TOKEN_VARIABLE, error)
            return
        staging.serve(channel, deadline)

    threading.Thread(target=run, name="miles-sync", daemon=True).start()
