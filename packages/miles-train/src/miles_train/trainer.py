"""What a trainer offers: the protocol that an application drives and `miles_train.conformance` examines."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles_core.types import Batch, Floats

if TYPE_CHECKING:  # a driver that checks settings imports this package, and not torch
    from torch import Tensor


class Trainer(Protocol):
    """One rank that holds a policy, or part of one, and learns from batches.

    Every method is collective: all ranks call it, in the same order. Where several ranks hold parts of one copy of the
    policy (tensor, pipeline, context parallelism) they must be given the same samples: a batch is dealt to copies, not
    to ranks, in `num_shards` shards, and a rank brings shard number `shard` to `step` and `logprobs`. A driver that
    has no trainer of its own knows both from `miles_train.megatron.layout.Layout`.
    """

    @property
    def shard(self) -> int:
        """Which shard of every batch this rank must be given, from 0."""
        ...

    @property
    def num_shards(self) -> int:
        """Into how many shards a batch is dealt: copies of the policy."""
        ...

    def step(self, minibatches: Sequence[Batch]) -> Mapping[str, float]:
        """Update once per minibatch; this rank's shard of each, which may be empty.

        Returns:
            Metrics, equal on all ranks: at least `loss`, `grad_norm`, `lr`, `entropy`, `logprob_gap` and `k3_kl`.

        Raises:
            NonFiniteError: a loss or gradient is not finite; raised on all ranks before that update.
        """
        ...

    def logprobs(self, batch: Batch) -> Floats:
        """Log probability of every token under the current weights, float32 [T]; 0 for the first of each sample.

        Every rank has those of the batch it was given.
        """
        ...

    def weights(self) -> Iterator[tuple[str, "Tensor"]]:
        """Yield every weight under its Hugging Face name, whole, on every rank. May be views that a step changes."""
        ...

    def save(self, path: str | Path, state: Mapping[str, Any], *, keep: int | None = None) -> None:
        """Write a checkpoint with the caller's JSON-able state; complete or not there. `latest` beside it names it."""
        ...

    def load(self, path: str | Path) -> dict[str, Any]:
        """Continue from a checkpoint, or from the one `latest` in `path` names; returns the state given to save."""
        ...

    def export(self, path: str | Path) -> None:
        """Write a Hugging Face directory; complete or not there."""
        ...

    def close(self) -> None:
        """Give back processes, groups and memory."""
        ...
