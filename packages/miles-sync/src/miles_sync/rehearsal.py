"""Rehearsing a model's own `load_weights`: everything runs but the writes.

A model's loader is the only one that knows how source tensors become its parameters (fused, sliced, padded).
Run under a dispatch mode, each operation that would write into a parameter is noted, with the bytes it would
write and the sources it would read, and skipped. What was noted shows before any change which sources the
loader ignores (it warns at most), which parameters would stay old, and any shape it refuses.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - where torch documents it
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: PLC2701 - what dispatch modes use

from miles_sync.errors import MismatchError


@dataclass(frozen=True)
class Rehearsal:
    """What a loader would do.

    Attributes:
        ignored: Source names of which nothing would be written.
        unwritten: Parameter names of which some element would not be written.
    """

    ignored: tuple[str, ...]
    unwritten: tuple[str, ...]


def rehearse(model: torch.nn.Module, sources: Mapping[str, torch.Tensor]) -> Rehearsal:
    """Run `model.load_weights` over `sources` without changing a parameter.

    Args:
        model: Has `load_weights(iterable of (name, tensor))`.
        sources: Tensors of the names, shapes and dtypes to come; their contents do not matter.

    Returns:
        What would happen. Raises `MismatchError` where the loader itself objects, with its words.
    """
    parameters = dict(model.named_parameters())
    watch = _Watch(parameters.values(), sources)
    data = {name: parameter.data for name, parameter in parameters.items()}
    try:
        with watch:
            model.load_weights(list(sources.items()))  # type: ignore[operator]
    except Exception as error:
        raise MismatchError(f"the model's loader objects: {type(error).__name__}: {error}", stage="begin") from error
    finally:
        for name, parameter in parameters.items():
            if parameter.data_ptr() != data[name].data_ptr():
                parameter.data = data[name]  # a loader that swaps storage: undo, it is unwritten below
    return Rehearsal(
        ignored=tuple(name for name in sources if name not in watch.read),
        unwritten=tuple(name for name, p in parameters.items() if not watch.covered(p)),
    )


class _Watch(TorchDispatchMode):
    """Skips writes into watched parameters, noting their extent and the sources that they come from.

    Attributes:
        read: Names of the sources that reached a parameter, or left torch as a number.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.read = {name for name, tensor in sources.items() if not tensor.numel()}
        self._written = {_storage(p): _Extents() for p in parameters}
        spans = sorted((t.data_ptr(), t.nbytes, name) for name, t in sources.items() if t.numel())
        self._starts = [start for start, _, _ in spans]
        self._spans = spans
        self._derived: dict[int, tuple[torch.Tensor, set[str]]] = {}  # what was computed from sources

    def covered(self, parameter: torch.Tensor) -> bool:
        """Whether every element of a parameter would be written."""
        return not parameter.numel() or self._written[_storage(parameter)].cover(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        origins = set[str]().union(*(self._origins(tensor) for tensor in inputs))
        targets = [t for t in _mutated(func, args, kwargs) if _storage(t) in self._written]
        if targets:
            _check_shapes(func, args, kwargs)
            for target in targets:
                self._written[_storage(target)].add(target)
            self.read |= origins
            return args[0]
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        if origins and not outputs:
            self.read |= origins  # .item(): what becomes of a number cannot be followed
        for output in outputs:
            if origins and not self._origins(output):
                self._derived[_storage(output)] = (output, origins)
        return result

    def _origins(self, tensor: torch.Tensor) -> set[str]:
        """The sources whose values a tensor holds."""
        derived = self._derived.get(_storage(tensor))
        if derived is not None:
            return derived[1]
        at = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or not tensor.numel():
            return set()
        start, nbytes, name = self._spans[at]
        return {name} if tensor.data_ptr() < start + nbytes else set()


class _Extents:
    """Which elements of one storage were written: ranges, and a flag per element once a write has gaps."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._flags: torch.Tensor | None = None

    def add(self, target: torch.Tensor) -> None:
        if target.is_contiguous():
            start = int(target.storage_offset())
            self._ranges.append((start, start + target.numel()))
        else:
            if self._flags is None:
                elements = target.untyped_storage().nbytes() // target.itemsize
                self._flags = torch.zeros(elements, dtype=torch.bool)
            _cut(self._flags, target).fill_(True)

    def cover(self, tensor: torch.Tensor) -> bool:
        if self._flags is not None:
            flags = self._flags.clone()
            for start, stop in self._ranges:
                flags[start:stop] = True
            return bool(_cut(flags, tensor).all())
        if not tensor.is_contiguous():
            return False
        reached = tensor.storage_offset()
        end = reached + tensor.numel()
        for start, stop in sorted(self._ranges):
            if start <= reached:
                reached = max(reached, stop)
        return reached >= end


def _check_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what the skipped operation would raise, and for a copy that would repeat its source along a dimension."""
    if func is torch.ops.aten.copy_.default and args[0].numel() != args[1].numel():
        raise ValueError(f"copies {list(args[1].shape)} into {list(args[0].shape)}")
    shadows = tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
    func(*shadows[0], **shadows[1])


def _cut(flags: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return flags.as_strided(like.size(), like.stride(), like.storage_offset())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes, by its schema."""
    values = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return _tensors(values)
