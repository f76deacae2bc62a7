"""The copy plan: which elements of which source tensor land in which elements of which parameter.

A plan is recorded once for a layout (`miles_sync.rehearsal.record`), is plain data (msgpack), and names parameters,
not addresses. Bound to the model that it was recorded from, it is replayed for every sync:

    record(model, manifest) ──▶ CopyPlan ──▶ bind(plan, manifest, model) ──▶ BoundPlan
                                                           begin()  ▸  install(pieces) *  ▸  finish()

`install` takes tensors or runs of their elements as they arrive. What a bucket's pieces mean is worked out once and
kept: a later sync costs one lookup a bucket and a handful of batched copies. Neighbours in both source and
parameter are merged: q, k and v of a fused projection are one copy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from miles_sync.errors import CommitError, ManifestError, MismatchError
from miles_sync.manifest import DTYPES, Manifest
from miles_sync.receivers import Pieces


class Region(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Elements of a one-dimensional storage: from `offset` on, `size` steps of `stride` in each dimension."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements named, repeats counted."""
        return math.prod(self.size)


class Copy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Elements of source tensor `source` (its index in the manifest) that land in parameter `parameter`.

    Both regions have the same size; element for element, converted to the parameter's dtype.
    """

    source: int
    parameter: int
    read: Region
    write: Region


class Fill(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Elements of a parameter that the loader sets to a constant: padding."""

    parameter: int
    write: Region
    value: bool | int | float


class Live(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A parameter (or buffer) of the model: what must still be there when the plan is bound."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class CopyPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a loader does, as data.

    Attributes:
        layout: Id of the manifest layout that it was recorded for.
        parameters: What it writes, by index.
        copies: In the order of the sources.
        fills: Constants, written before any copy.
        through_loader: Sources whose values the loader computes with, by name, and why: they are handed to the
            model's own loader in `finish`.
        partial: Sources of which this rank reads only a part, and what it reads: slices of tensor parallelism.
        skipped: Sources that the loader leaves out for a reason that is known, by name, and that reason.
        refreshes: Whether the model derives other tensors from its parameters after loading.
    """

    layout: str
    parameters: tuple[Live, ...]
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    through_loader: dict[str, str]
    partial: dict[str, tuple[Region, ...]]
    skipped: dict[str, str]
    refreshes: bool

    def digest(self) -> str:
        """32 hex digits: equal for equal plans."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()

    def encode(self) -> bytes:
        """Write it as msgpack."""
        return msgspec.msgpack.encode(self)


def decode(data: bytes) -> CopyPlan:
    """Read a plan. Raises `ManifestError` for anything that is not one."""
    try:
        return msgspec.msgpack.decode(data, type=CopyPlan, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"not a copy plan: {error}", stage="begin") from error


def unread(plans: Sequence[CopyPlan], manifest: Manifest) -> list[str]:
    """Sources of which some element is read by no rank of an engine, given every rank's plan; [] is complete."""
    whole: set[str] = set()
    parts: dict[str, list[Region]] = {}
    names = [entry.name for entry in manifest.entries]
    for plan in plans:
        read = {names[copy.source] for copy in plan.copies} | plan.through_loader.keys()
        whole |= (read - plan.partial.keys()) | plan.skipped.keys()
        for name, regions in plan.partial.items():
            parts.setdefault(name, []).extend(regions)
    missing = []
    for entry in manifest.entries:
        if entry.name in whole or not entry.nbytes:
            continue
        count = math.prod(entry.shape)
        if Extents(parts.get(entry.name, ())).count() != count:
            missing.append(entry.name)
    return missing


class Extents:
    """A set of elements of one storage, given as regions."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        """Start with some regions."""
        self.regions = [region for region in regions if region.numel]

    def add(self, region: Region) -> None:
        """Add a region."""
        if region.numel:
            self.regions.append(region)

    def count(self) -> int:
        """How many elements are named, each counted once."""
        runs = self._runs()
        if runs is None:
            return int(self._times().ne(0).sum())
        total = end = 0
        for start, stop in sorted(runs):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        return total

    def repeats(self) -> bool:
        """Whether some element is named twice."""
        return self.count() != sum(region.numel for region in self.regions)

    def cover(self, region: Region) -> bool:
        """Whether every element of a region is named."""
        runs = self._runs()
        if runs is None or not _dense(region):
            times = self._times(_end(region))
            return bool(times.as_strided(region.size, region.stride, region.offset).all())
        reached = region.offset
        for start, stop in sorted(runs):
            if start <= reached:
                reached = max(reached, stop)
        return reached >= region.offset + region.numel

    def _runs(self) -> list[tuple[int, int]] | None:
        """All regions as (start, stop), or None where one of them has gaps."""
        if not all(map(_dense, self.regions)):
            return None
        return [(region.offset, region.offset + region.numel) for region in self.regions]

    def _times(self, at_least: int = 0) -> torch.Tensor:
        """How often each element is named, from the first of the storage on."""
        times = torch.zeros(max([at_least, *map(_end, self.regions)]), dtype=torch.int32)
        for region in self.regions:
            times.as_strided(region.size, region.stride, region.offset).add_(1)
        return times


def paired(read: Region, write: Region) -> tuple[Region, Region]:
    """The same element pairs in as few dimensions as they allow: two contiguous regions become one run each."""
    dims: list[tuple[int, int, int]] = []
    for size, source, target in zip(read.size, read.stride, write.stride, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == source * size and dims[-1][2] == target * size:
            dims[-1] = (dims[-1][0] * size, source, target)
        else:
            dims.append((size, source, target))
    if not dims:
        dims = [(1, 1, 1)]
    size, source, target = (tuple(column) for column in zip(*dims, strict=True))
    return Region(read.offset, size, source), Region(write.offset, size, target)


class UnevenError(ValueError):
    """Elements that are not in even steps along the axes of a tensor."""


def along_axes(view: Region, write: Region, shape: Sequence[int]) -> tuple[list[int], list[tuple[int, int]], Region]:
    """A view of a contiguous tensor of `shape`, dimension by dimension along single axes.

    Args:
        view: Of the tensor's storage.
        write: Where the view's elements go, of the same size.
        shape: Of the tensor.

    Returns:
        The view's first index; per dimension the axis and step that it moves along; and `write` in these
        dimensions: one that runs through several axes is split into one for each. Raises `UnevenError` where it
        does so unevenly.
    """
    weights = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    rest = view.offset
    start = []
    for weight in weights:
        start.append(rest // weight)
        rest %= weight
    reach = list(start)
    steps, sizes, strides = [], [], []
    todo = [d for d in zip(view.size, view.stride, write.stride, strict=True) if d[0] != 1][::-1]
    while todo:
        size, stride, target = todo.pop()
        axis, step = 0, 0
        if stride:
            axis = next(a for a, weight in enumerate(weights) if stride >= weight and shape[a] > 1)
            step, uneven = divmod(stride, weights[axis])
            span = shape[axis]
            beyond = reach[axis] + step * (size - 1) >= span
            if uneven or (beyond and (step > 1 or reach[axis] or size % span)):
                raise UnevenError("a copy that was reshaped unevenly across its dimensions")
            if beyond:
                todo.append((size // span, stride * span, target * span))
                size = span
            reach[axis] += step * (size - 1)
        steps.append((axis, step))
        sizes.append(size)
        strides.append(target)
    return start, steps, Region(write.offset, tuple(sizes), tuple(strides))


def overlap(write: Region, j: int, start: int, step: int, span: tuple[int, int]) -> tuple[int, Region]:
    """Indices along dimension `j` whose positions `start + index * step` lie in a span.

    Returns:
        The first such position, and the part of `write` that belongs to them.
    """
    low = max(0, -(-(span[0] - start) // step))
    high = min(write.size[j], -(-(span[1] - start) // step))
    size = (*write.size[:j], max(0, high - low), *write.size[j + 1 :])
    return start + low * step, Region(write.offset + low * write.stride[j], size, write.stride)


def clipped(copy: Copy, start: int, stop: int) -> list[Copy]:
    """The part of a copy whose source elements lie in `[start, stop)`: a few copies, none where there is nothing."""
    read = copy.read
    last = _end(read) - 1
    if start <= read.offset and last < stop:
        return [copy]
    if last < start or read.offset >= stop:
        return []
    # Cut along the dimension with the longest step: its slices are the most nearly sorted by position.
    dim = max(range(len(read.size)), key=lambda d: read.stride[d])
    step = read.stride[dim]
    reach = last - read.offset - (read.size[dim] - 1) * step  # of one slice, beyond its first element
    first_whole = max(0, -(-(start - read.offset) // step))
    end_whole = max(first_whole, min(read.size[dim], (stop - 1 - reach - read.offset) // step + 1))
    first_any = max(0, (start - reach - read.offset + step - 1) // step)
    end_any = min(read.size[dim], (stop - 1 - read.offset) // step + 1)
    pieces = []
    if first_whole < end_whole:
        pieces.append(_narrowed(copy, dim, first_whole, end_whole - first_whole))
        edges = [*range(first_any, first_whole), *range(end_whole, end_any)]
    else:
        edges = list(range(first_any, end_any))
    for index in edges:
        pieces += clipped(_narrowed(copy, dim, index, 1), start, stop)
    return pieces


def bind(plan: CopyPlan, manifest: Manifest, model: torch.nn.Module) -> BoundPlan:
    """Resolve a plan's parameters in a model.

    Raises `MismatchError` where the plan is for another layout, or a parameter is missing or has changed.
    """
    if plan.layout != manifest.layout_id():
        raise MismatchError("the copy plan was recorded for another layout: record it again", stage="begin")
    live = written(model)
    targets = []
    for meta in plan.parameters:
        tensor = live.get(meta.name)
        if tensor is None or live_of(meta.name, tensor) != meta:
            found = "is missing" if tensor is None else f"is {live_of(meta.name, tensor)}"
            raise MismatchError(f"parameter {meta.name!r} {found}, the plan has {meta}", stage="begin")
        targets.append(tensor)
    return BoundPlan(plan, manifest, model, tuple(targets))


def written(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a loader may write: parameters, then buffers, detached."""
    live = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return live | {name: buffer for name, buffer in model.named_buffers() if name not in live}


def live_of(name: str, tensor: torch.Tensor) -> Live:
    """Describe a live tensor."""
    return Live(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


class BoundPlan:
    """A plan whose parameters are resolved: writes what arrives into the live weights.

    The addresses of the weights never change. Not safe for two threads at once.

    Attributes:
        plan: What is replayed.
    """

    def __init__(
        self, plan: CopyPlan, manifest: Manifest, model: torch.nn.Module, targets: tuple[torch.Tensor, ...]
    ) -> None:
        """Use `bind`."""
        self.plan = plan
        self._model = model
        self._entries = manifest.entries
        self._targets = targets
        self._fresh = True
        self._by_source: dict[int, list[Copy]] = {}
        for copy in plan.copies:
            self._by_source.setdefault(copy.source, []).append(copy)
        self._held = {
            index: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device=targets[0].device)
            for index, entry in enumerate(manifest.entries)
            if entry.name in plan.through_loader
        }

    @property
    def held_bytes(self) -> int:
        """Memory held for the sources that go through the model's loader."""
        return sum(tensor.nbytes for tensor in self._held.values())

    def install(self, pieces: Pieces) -> None:
        """Write pieces of the manifest's tensors into the live weights.

        Args:
            pieces: On the device of the weights, or on the host. What they mean is worked out once and kept in their
                memo.
        """
        if pieces.memo is None or pieces.memo[0] is not self:
            pieces.memo = self, self._compile(pieces)
        with torch.no_grad():
            if self._fresh:
                for fill in self.plan.fills:
                    _cut(self._targets[fill.parameter], fill.write).fill_(fill.value)
                self._fresh = False
            for targets, sources in pieces.memo[1]:
                torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]

    def begin(self) -> None:
        """A sync starts: with its first piece the constants are written too."""
        self._fresh = True

    def finish(self) -> None:
        """Hand the model's loader what it computes with, and have the model derive what it derives from its weights.

        Raises `CommitError` where the model's own code fails.
        """
        try:
            if self._held:
                held = [(self._entries[index].name, tensor) for index, tensor in self._held.items()]
                self._model.load_weights(held)  # type: ignore[operator]
            if self.plan.refreshes:
                self._model.post_load_weights()  # type: ignore[operator]
        except Exception as error:
            raise CommitError(f"the model's own loader failed: {type(error).__name__}: {error}", stage="commit") from (
                error
            )

    def _compile(self, pieces: Pieces) -> list[_Step]:
        """What some pieces hold, as a few batched copies."""
        runs: list[_Run] = []
        held: list[tuple[torch.Tensor, torch.Tensor]] = []
        for piece in pieces:
            count = piece.data.numel()
            for copy in self._by_source.get(piece.index, ()):
                for part in clipped(copy, piece.start, piece.start + count):
                    runs.append(_Run(piece.data, int(piece.data.storage_offset()) - piece.start, part))
            if piece.index in self._held:
                into = self._held[piece.index].view(-1)[piece.start : piece.start + count]
                held.append((into, piece.data.reshape(-1)))
        pairs = [self._pair(run) for run in _merged(runs)] + held
        return _batched(pairs)

    def _pair(self, run: _Run) -> tuple[torch.Tensor, torch.Tensor]:
        read, write = run.copy.read, run.copy.write
        return (
            _cut(self._targets[run.copy.parameter], write),
            run.data.as_strided(read.size, read.stride, run.base + read.offset),
        )


_Step = tuple[list[torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class _Run:
    """One copy out of a piece: `base` is where its source tensor starts in the piece's storage (may be negative)."""

    data: torch.Tensor
    base: int
    copy: Copy


def _merged(runs: Iterable[_Run]) -> list[_Run]:
    """Join runs that are contiguous and follow each other on both sides."""
    merged: list[_Run] = []
    for run in runs:
        joined = _joined(merged[-1], run) if merged else None
        if joined is None:
            merged.append(run)
        else:
            merged[-1] = joined
    return merged


def _joined(before: _Run, after: _Run) -> _Run | None:
    first, second = before.copy, after.copy
    if not first.read.stride == first.write.stride == second.read.stride == second.write.stride == (1,):
        return None
    if before.data.dtype != after.data.dtype or first.parameter != second.parameter:
        return None
    if before.data.untyped_storage()._cdata != after.data.untyped_storage()._cdata:
        return None
    count = first.read.numel
    if before.base + first.read.offset + count != after.base + second.read.offset:
        return None
    if first.write.offset + count != second.write.offset:
        return None
    size = (count + second.read.numel,)
    read, write = Region(first.read.offset, size, (1,)), Region(first.write.offset, size, (1,))
    return _Run(before.data, before.base, Copy(first.source, first.parameter, read, write))


def _batched(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[_Step]:
    """Group pairs that one batched copy can take: dtypes equal, both contiguous; the others go one by one."""
    groups: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in pairs:
        key = (target.dtype, source.dtype, target.is_contiguous() and source.is_contiguous())
        targets, sources = groups.setdefault(key, ([], []))
        targets.append(target)
        sources.append(source)
    return list(groups.values())


def _cut(parameter: torch.Tensor, region: Region) -> torch.Tensor:
    return parameter.as_strided(region.size, region.stride, parameter.storage_offset() + region.offset)


def _narrowed(copy: Copy, dim: int, first: int, count: int) -> Copy:
    def cut(region: Region) -> Region:
        size = (*region.size[:dim], count, *region.size[dim + 1 :])
        return Region(region.offset + first * region.stride[dim], size, region.stride)

    return Copy(copy.source, copy.parameter, *paired(cut(copy.read), cut(copy.write)))


def _end(region: Region) -> int:
    """One past the last element that a region names."""
    return region.offset + 1 + sum((n - 1) * step for n, step in zip(region.size, region.stride, strict=True))


def _dense(region: Region) -> bool:
    """Whether a region is one run of elements without gaps or repeats, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(region.size, region.stride, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def faults(what: Mapping[str, Iterable[str]], listed: Callable[[Iterable[str]], str]) -> str:
    """Join what is wrong, leaving out what is not."""
    found = {text: list(names) for text, names in what.items()}
    return "; ".join(f"{text}: {listed(names)}" for text, names in found.items() if names)
