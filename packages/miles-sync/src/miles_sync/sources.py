"""Sources: where the sender's tensors come from.

A source says first what it holds, then yields it. Any object with `metadata()` and iteration is one: a trainer
that gathers shards on the fly passes its own and never holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import torch

from miles_sync.manifest import TensorMeta, describe


@runtime_checkable
class Source(Protocol):
    """Named tensors, announced before they are produced."""

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, dtype and shape of each tensor, in the order of iteration."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors. Each is read before the next is asked for, so memory may be reused."""
        ...


class NamedTensors:
    """A source over (name, tensor) pairs.

    A one-shot iterator is held whole from here on: to stream, write a `Source` that knows its metadata.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hold the pairs, not copies of them."""
        self._tensors = list(tensors)

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, dtype and shape of each tensor."""
        return [describe(name, tensor) for name, tensor in self._tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the pairs."""
        return iter(self._tensors)


def named_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that make up a module's weights: parameters, then persistent buffers, detached, not copied.

    Tied parameters appear once, under the first of their names.
    """
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    weights |= {
        name: value
        for name, value in module.state_dict().items()
        if name not in tied and isinstance(value, torch.Tensor)
    }
    return weights


def as_source(
    weights: torch.nn.Module | Mapping[str, torch.Tensor] | Source | Iterable[tuple[str, torch.Tensor]],
) -> Source:
    """Take a module, a mapping, a `Source` or an iterable of (name, tensor) as a `Source`."""
    if isinstance(weights, torch.nn.Module):
        return NamedTensors(named_weights(weights).items())
    if isinstance(weights, Mapping):
        return NamedTensors(cast(Mapping[str, torch.Tensor], weights).items())
    if isinstance(weights, Source):
        return weights
    return NamedTensors(weights)
