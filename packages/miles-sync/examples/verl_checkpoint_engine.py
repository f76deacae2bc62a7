"""verl takes its weights over miles-sync: a backend for its registry of checkpoint engines.

Written against verl 0.9.1 (`verl.checkpoint_engine.base`). In verl's configuration:

    actor_rollout_ref.rollout.checkpoint_engine.backend=miles_sync
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_checkpoint_engine

and the same MILES_SYNC_TOKEN, 16 characters or more, in the environment of all of Ray's workers.

Rank 0 of the actor sends, the other ranks walk the generator, for making each tensor is a collective of theirs. Every
rollout worker receives all tensors, verified, before it hands the first to its engine: an interrupted transfer leaves
the engine as it was. Where the sender sees the receiver's GPU, bytes go device to device.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from miles_sync import Manifest, ReceiverServer, ReceiverTarget, TensorMeta, WeightSync, serve
from miles_sync.channel import Deadline
from miles_sync.manifest import DTYPES, describe
from miles_sync.messages import Mode
from miles_sync.receivers import Pieces, fingerprint
from miles_sync.routes import Transport

_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Address:
    """Where a rollout worker receives; port 0 for an actor, which does not."""

    host: str = ""
    port: int = 0


class Holding:
    """A receiver whose weights are the tensors that arrived, kept until they are taken."""

    exact = True

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tensors: dict[str, torch.Tensor] = {}
        self.committed = -1
        self._by_index: list[torch.Tensor] = []

    def check(self, manifest: Manifest) -> None:
        """Anything fits: the engine that takes the tensors checks them."""

    def begin(self, manifest: Manifest, mode: Mode) -> None:
        """Make room, unless the room of the last sync fits."""
        metas = [TensorMeta(entry.name, entry.dtype, entry.shape) for entry in manifest.entries]
        if metas != [describe(name, tensor) for name, tensor in self.tensors.items()]:
            self.tensors = {
                entry.name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=self.device)
                for entry in manifest.entries
            }
        self._by_index = list(self.tensors.values())

    def install(self, pieces: Pieces) -> None:
        """Put each piece in its place."""
        for piece in pieces:
            into = self._by_index[piece.index].view(-1)[piece.start : piece.start + piece.data.numel()]
            into.copy_(piece.data.view(-1))

    def commit(self, version: int) -> None:
        """They may be taken."""
        self.committed = version

    def abandon(self) -> None:
        """Nothing is taken before a commit."""

    def fingerprint(self) -> Any:
        """Digest of the tensors."""
        return fingerprint(self.tensors)


class Announced:
    """verl's generator as a source.

    It cannot say what it will yield before it does: the first sync holds everything in host memory to learn it, later
    ones stream from `device`.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._metas: list[TensorMeta] = []
        self._weights: Iterator[tuple[str, torch.Tensor]] = iter(())

    def of(self, weights: Generator[tuple[str, torch.Tensor], None, None]) -> Announced:
        """Take this sync's generator."""
        self._weights = weights
        if not self._metas:
            held = []
            for name, tensor in weights:
                self._next_device = tensor.device
                held.append((name, tensor.detach().cpu()))
            self._metas = [describe(name, tensor) for name, tensor in held]
            self._weights = iter(held)
        else:
            self.device = self._next_device
        return self

    def metadata(self) -> Sequence[TensorMeta]:
        """What the first sync brought."""
        return self._metas

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors."""
        return ((name, tensor.detach()) for name, tensor in self._weights)


@CheckpointEngineRegistry.register("miles_sync")
class MilesCheckpointEngine(CheckpointEngine):
    """Actor's and rollout's half in one class, as verl has them.

    Args:
        bucket_size: Of verl's own engines; miles-sync chooses its own.
        is_master: Whether this is rank 0 of the actor; verl leaves it out in rollout workers.
        transport: As `WeightSync` has it.
    """

    def __init__(self, bucket_size: int, is_master: bool | None = None, transport: Transport = "auto") -> None:
        self._receives = is_master is None
        self._transport: Transport = transport
        self._token = os.environ["MILES_SYNC_TOKEN"]
        self._source = Announced()
        self._sync: WeightSync | None = None
        self._targets: list[Address] = []
        self._server: ReceiverServer | None = None
        self._receiver = Holding()
        self._version = 0

    def prepare(self) -> Address:
        """Listen where weights are received, and say where. Stays open from sync to sync."""
        if not self._receives:
            return Address()
        if self._server is None:
            host = socket.gethostbyname(socket.gethostname())
            self._server = serve(self._receiver, token=self._token, host=host)
        return Address(self._server.host, self._server.port)

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Address]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Tell the actor's rank 0 who listens, the others nothing."""
        receivers = metadata[actor_wg_world_size:]
        actor = {"receivers": [receivers] + [[]] * (actor_wg_world_size - 1)}
        return actor, {"receivers": [[]] * rollout_world_size}

    def init_process_group(self, receivers: list[Address]) -> None:
        """Connect to whoever listens: anew where that has changed."""
        if receivers == self._targets:
            return
        if self._sync is not None:
            self._sync.close()
        targets = [ReceiverTarget(receiver.host, receiver.port) for receiver in receivers]
        self._sync = WeightSync(targets, token=self._token, transport=self._transport, deadline_s=_DEADLINE_S)
        self._targets = receivers

    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Push the generator's tensors as the next version."""
        if self._sync is None:
            for _ in weights:
                pass
            return
        versions = [state.version for state in await asyncio.to_thread(self._sync.status)]
        self._version = max((version for version in versions if version is not None), default=0) + 1
        await asyncio.to_thread(self._sync.push, self._source.of(weights), self._version)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Wait for the next version, then yield its tensors."""
        deadline = Deadline(_DEADLINE_S)
        while self._receiver.committed <= self._version:
            if not deadline.left():
                raise TimeoutError(f"nothing after version {self._version} was committed within {_DEADLINE_S:g} s")
            await asyncio.sleep(0.005)
        self._version = self._receiver.committed
        for name, tensor in self._receiver.tensors.items():
            yield name, tensor

    def finalize(self) -> None:
        """Nothing: connections and memory are used again."""
