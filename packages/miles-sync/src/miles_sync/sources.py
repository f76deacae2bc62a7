"""Sources: where the sender's tensors come from.

A source says first what it holds, then yields it. Any object with `metadata()` and iteration is one: a trainer
that gathers shards on the fly passes its own and never holds the whole model. `miles_sync.shards` has the sources of
which no rank holds whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch

from miles_sync.errors import ManifestError
from miles_sync.manifest import DTYPES, TensorMeta, describe

Encode = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Turns a named tensor into the parts that travel in its place: itself, or quantised values and their scales."""


@runtime_checkable
class Source(Protocol):
    """Named tensors, announced before they are produced."""

    def metadata(self) -> Sequence[Any]:
        """Name, dtype and shape of each tensor, in the order of iteration.

        `TensorMeta`s, or what other stacks have: objects with these attributes, or triples; the dtype may be torch's.
        """
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors. Each is read before the next is asked for, so memory may be reused."""
        ...


@runtime_checkable
class Held(Source, Protocol):
    """A source whose tensors stay where they are, unchanged, for as long as a push lasts."""

    def held(self) -> Sequence[torch.Tensor]:
        """All tensors, one for each of `metadata`, in its order."""
        ...


class NamedTensors:
    """A source over (name, tensor) pairs.

    A one-shot iterator is held whole from here on: to stream, write a `Source` that knows its metadata.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hold the pairs, not copies of them."""
        self._tensors = list(tensors)
        self._metadata: list[TensorMeta] | None = None

    def metadata(self) -> Sequence[TensorMeta]:
        """Name, dtype and shape of each tensor."""
        if self._metadata is None:
            self._metadata = [describe(name, tensor) for name, tensor in self._tensors]
        return self._metadata

    def held(self) -> Sequence[torch.Tensor]:
        """The tensors."""
        return [tensor for _, tensor in self._tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the pairs."""
        return iter(self._tensors)


class Encoded:
    """A source whose tensors are encoded one by one while they are packed, so that fewer bytes travel.

    Args:
        source: What is encoded.
        encode: `(name, tensor) -> [(name, part), ...]`. Parts are packed before the next tensor is encoded, so they may
            live in memory that is reused. It knows the tensor's name, for some are left as they are.
        parts: Says what `encode` will return of a tensor, before its bytes are there. Where it is left out, `encode`
            itself is asked, with a tensor on the meta device.
    """

    def __init__(
        self,
        source: torch.nn.Module | Mapping[str, torch.Tensor] | Source | Iterable[tuple[str, torch.Tensor]],
        encode: Encode,
        *,
        parts: Callable[[TensorMeta], Sequence[TensorMeta]] | None = None,
    ) -> None:
        """Keep the source; nothing is encoded yet."""
        self._source = as_source(source)
        self._encode = encode
        self._parts = parts or self._ask

    def metadata(self) -> Sequence[TensorMeta]:
        """Of the parts."""
        return [part for meta in metadata_of(self._source) for part in self._parts(meta)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Encode and yield."""
        for name, tensor in self._source:
            yield from self._encode(name, tensor)

    def _ask(self, meta: TensorMeta) -> Sequence[TensorMeta]:
        shadow = torch.empty(meta.shape, dtype=DTYPES[meta.dtype], device="meta")
        try:
            return [describe(name, part) for name, part in self._encode(meta.name, shadow)]
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (
                f"encode could not say what it makes of {meta.name!r} from a tensor without bytes ({error}): "
                "pass parts= to Encoded"
            )
            raise ManifestError(reason, stage="begin") from error


class _Announced:
    """Somebody else's source, its metadata in our form."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def device(self) -> torch.device:
        return getattr(self._source, "device", torch.device("cpu"))

    def metadata(self) -> Sequence[TensorMeta]:
        return metadata_of(self._source)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._source)


def metadata_of(source: Source) -> list[TensorMeta]:
    """A source's metadata in our form. Raises `ManifestError` for what is not name, dtype and shape."""
    return [_normal(item) for item in source.metadata()]


def _normal(item: Any) -> TensorMeta:
    if isinstance(item, TensorMeta):
        return item
    try:
        name, dtype, shape = item if isinstance(item, tuple | list) else (item.name, item.dtype, item.shape)
        meta = TensorMeta(str(name), str(dtype).removeprefix("torch."), tuple(int(size) for size in shape))
    except (AttributeError, TypeError, ValueError) as error:
        raise ManifestError(f"metadata() has {item!r}, not a name, a dtype and a shape", stage="begin") from error
    if meta.dtype not in DTYPES:
        raise ManifestError(
            f"tensor {meta.name!r} has dtype {meta.dtype}; one of {', '.join(DTYPES)} can be sent",
            stage="begin",
        )
    return meta


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
    if isinstance(weights, Held | Encoded):
        return weights
    if isinstance(weights, Source):
        return _Announced(weights)
    return NamedTensors(weights)
