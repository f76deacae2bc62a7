"""Weights that live in memory which receivers can map: nothing is packed, a push says only that they are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from miles_sync.manifest import TensorMeta, describe, lay_out, views
from miles_sync.sources import named_weights
from miles_sync.transports.shm import Segment


class SharedArena:
    """A source whose tensors lie in one shared segment, in the order and at the offsets of a manifest.

    `adopt` moves a module's weights there for good: what the optimizer writes, receivers on this machine see once it
    is pushed. Between pushes the tensors may change; during one they must not.

    Attributes:
        segment: The shared memory.
        tensors: By name, views of it.
    """

    def __init__(self, metas: Sequence[TensorMeta]) -> None:
        """Make an arena for such tensors, all zero. Raises `TransportError` where there is no room."""
        manifest = lay_out(metas, version=0)
        self._metas = tuple(metas)
        self.segment = Segment(manifest.total_bytes)
        self.tensors = views(manifest.entries, self.segment.data)

    @classmethod
    def like(cls, module: torch.nn.Module) -> SharedArena:
        """An arena that has room for a module's weights."""
        return cls([describe(name, tensor) for name, tensor in named_weights(module).items()])

    @classmethod
    def adopt(cls, module: torch.nn.Module) -> SharedArena:
        """Move a module's parameters and persistent buffers (in host memory) into a new arena."""
        arena = cls.like(module)
        with torch.no_grad():
            for name, tensor in named_weights(module).items():
                arena.tensors[name].copy_(tensor)
                tensor.set_(arena.tensors[name])  # type: ignore[call-overload]
            for name, parameter in module.named_parameters():
                parameter.data = arena.tensors[name]
        return arena

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, dtype and shape of each tensor."""
        return self._metas

    def held(self) -> Sequence[torch.Tensor]:
        """The tensors, which stay where they are."""
        return list(self.tensors.values())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors."""
        return iter(self.tensors.items())
