"""TRL keeps a stock SGLang server on policy: a callback for every trainer, and a backend for async GRPO.

Written against TRL 1.16.0. Any of its trainers takes a callback of transformers':

    trainer = GRPOTrainer(..., callbacks=[SyncCallback(lambda: WeightSync([SGLangTarget(url)], token=token))])

and asks the server for completions in its `rollout_func`. `trl.experimental.async_grpo.AsyncGRPOTrainer` takes an
object of its `WeightTransferProtocol`:

    trainer = AsyncGRPOTrainer(..., weight_transfer=MilesWeightTransfer(SGLangTarget(url), token=token))

Models of one rank, or replicated ones: rank 0 pushes what it holds. For a sharded model see `miles_sync.shards`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from miles_sync import SyncReport, TensorMeta, WeightSync
from miles_sync.manifest import describe
from miles_sync.sglang import SGLangTarget


class SyncCallback(TrainerCallback):
    """Pushes the model when training begins and after every few optimizer steps.

    Args:
        connect: Makes the `WeightSync`; called on rank 0 alone, once.
        every_steps: Optimizer steps between pushes.

    Attributes:
        report: Of the last push.
    """

    def __init__(self, connect: Callable[[], WeightSync], *, every_steps: int = 1) -> None:
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be 1 or more")
        self._connect = connect
        self._every_steps = every_steps
        self._sync: WeightSync | None = None
        self._version = 0
        self.report: SyncReport | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the receivers to the weights that training starts from."""
        if state.is_world_process_zero:
            self._sync = self._connect()
            served = [target.version for target in self._sync.status()]
            self._version = max((version for version in served if version is not None), default=-1)
            self._push(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push when it is time."""
        if self._sync is not None and state.global_step % self._every_steps == 0:
            self._push(kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hang up; the receivers go on serving the last version."""
        if self._sync is not None:
            self._sync.close()
            self._sync = None

    def _push(self, model: torch.nn.Module) -> None:
        assert self._sync is not None
        self._version += 1
        # Under data parallelism the trainer hands out its wrapper, whose names start with "module.".
        self.report = self._sync.push(getattr(model, "module", model), self._version)


class MilesWeightTransfer:
    """TRL's `WeightTransferProtocol`: called by the trainer's main process around each sync.

    Args:
        target: The server.
        token: Shared with it.
        name_of: What the server calls a tensor of the trainer.
    """

    def __init__(self, target: SGLangTarget, *, token: str, name_of: Callable[[str], str] = lambda name: name) -> None:
        self._target = target
        self._sync = WeightSync([target], token=token)
        self._name_of = name_of
        self._source = _Streamed()
        self._version = 0

    def init_weight_transfer(self) -> None:
        """Connect."""
        served = self._sync.status()[0].version
        self._version = -1 if served is None else served

    def pause(self) -> None:
        """Hold running requests; their cache is computed anew afterwards."""
        self._target.pause("retract")

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Push what the trainer yields."""
        self._version += 1
        self._sync.push(self._source.of((self._name_of(n), t) for n, t in iterator), self._version)

    def resume(self) -> None:
        """Go on. Prefixes cached with the old weights stay: give each version of a request its own `extra_key`."""
        self._target.resume()

    def destroy(self) -> None:
        """Hang up."""
        self._sync.close()


class _Streamed:
    """An iterator as a source. The first is held to learn what it yields, later ones stream."""

    def __init__(self) -> None:
        self._metas: list[TensorMeta] = []
        self._weights: Iterator[tuple[str, torch.Tensor]] = iter(())

    def of(self, weights: Iterator[tuple[str, torch.Tensor]]) -> _Streamed:
        self._weights = weights
        if not self._metas:
            held = [(name, tensor.detach().cpu()) for name, tensor in weights]
            self._metas = [describe(name, tensor) for name, tensor in held]
            self._weights = iter(held)
        return self

    def metadata(self) -> Sequence[TensorMeta]:
        return self._metas

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.detach()) for name, tensor in self._weights)
