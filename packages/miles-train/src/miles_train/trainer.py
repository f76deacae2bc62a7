"""What a trainer offers: the protocol that an application drives and `miles_train.conformance` examines."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles_core.types import Batch, Floats

if TYPE_CHECKING:  # a driver that checks settings imports this package, and not torch
    from torch import Tensor


class Trainer(Protocol):
    """One rank that holds a policy and learns from batches. Every method is collective over the trainer's ranks."""

    def step(self, minibatches: Sequence[Batch]) -> Mapping[str, float]:
        """Update once per minibatch; this rank's shard of each.

        Returns:
            Metrics, equal on all ranks: at least `loss`, `grad_norm`, `lr`, `entropy`, `logprob_gap` and `k3_kl`.

        Raises:
            NonFiniteError: a loss or gradient is not finite; raised on all ranks before that update.
        """
        ...

    def logprobs(self, batch: Batch) -> Floats:
        """Log probability of every token under the current weights, float32 [T]; 0 for the first of each sample."""
        ...

    def weights(self) -> Iterator[tuple[str, "Tensor"]]:
        """Yield every weight under its Hugging Face name. May be views that the next step changes."""
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
