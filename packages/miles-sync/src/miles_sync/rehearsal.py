"""Recording a copy plan: a model's own `load_weights` runs over descriptors, and what it would write is noted.

A model's loader is the only one that knows how source tensors become its parameters (fused, sliced, stacked, padded).
It is run over tensors that have names, shapes and strides, but no bytes. Each operation on one of them
comes here, in whatever thread it runs:

- a view (narrow, chunk, transpose, ...) stays a view of its source: offset and strides are known exactly;
- a rearranged copy (clone, cast, cat, stack) is looked through, element by element;
- anything else is arithmetic: what is made of it cannot be replayed by copying, and the sources are named as going
  through the loader itself;
- a write into a parameter is noted and skipped. So is a fill with a constant.

Nothing of the model changes. What was noted shows, before any change, which sources the loader leaves out (it warns
at most), which parameters would stay old, which would be written twice, and any shape that it refuses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - where torch documents it
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: PLC2701 - what dispatch modes use

from miles_sync.errors import MismatchError
from miles_sync.manifest import DTYPES, Manifest
from miles_sync.plan import (
    Copy,
    CopyPlan,
    Extents,
    Fill,
    Region,
    UnevenError,
    along_axes,
    faults,
    live_of,
    overlap,
    paired,
    written,
)
from miles_sync.receivers import listed

_aten = torch.ops.aten
_SAME = {_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}
_JOINED = {_aten.cat.default, _aten.stack.default}
_CONSTANTS = {_aten.fill_.Scalar, _aten.zero_.default}

_MARK_STEP = 2.0**-40
"""Numbers that stand for the value of a one-element source are 1 + k * _MARK_STEP: unlike any that a loader writes by
itself, and 1 to within what a loader's assertion may ask of a scale."""

_MARK_BASE = 1 << 40


def record(model: torch.nn.Module, manifest: Manifest, *, sliced: bool = False) -> CopyPlan:
    """Run `model.load_weights` over descriptors of a manifest's tensors, changing nothing.

    Args:
        model: Has `load_weights(iterable of (name, tensor))`.
        manifest: Names, shapes and dtypes to come.
        sliced: Whether this model holds one rank's slices: it may then leave parts of a source to other ranks
            (see `miles_sync.plan.unread`, which holds all ranks' plans together).

    Returns:
        The plan, complete: every element of every parameter is written once, by a copy, a fill or the loader, and
        every source element is read or explained. Raises `MismatchError` naming what is not, and where the
        loader itself objects, with its words.
    """
    recorder = _Recorder(model, manifest)
    recorder.run()
    plan = recorder.plan()
    _check_complete(recorder, plan, sliced)
    return plan


# -- what a tensor without bytes holds -----------------------------------------------------------------


@dataclass
class _Origin:
    """What one descriptor's storage holds: elements of others, or something computed.

    Attributes:
        source: Index of the source that it is, or None.
        pieces: For a contiguous rearranged copy: descriptors that lie one after the other along `dim`.
        dim: See `pieces`.
        computed: The operation that made it, where that is arithmetic; "" otherwise.
        sources: Indices of all sources that it depends on.
    """

    source: int | None = None
    pieces: tuple[_Described, ...] = ()
    dim: int = 0
    computed: str = ""
    sources: set[int] = field(default_factory=set)


class _Described(torch.Tensor):
    """A tensor without bytes; its meta tensor carries shape and strides, its storage the origin."""

    shape_only: torch.Tensor
    origin: _Origin
    recorder: _Recorder

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def make(inner: torch.Tensor, origin: _Origin, recorder: _Recorder) -> _Described:
        made = torch.Tensor._make_wrapper_subclass(
            _Described,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),  # where SGLang loads in threads from the host, it does not from here
        )
        made.shape_only, made.origin, made.recorder = inner, origin, recorder
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        described = _described((args, kwargs))
        return described[0].recorder.dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Brings operations on parameters alone to the recorder; those on descriptors come there by themselves."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self._recorder.dispatch(func, args, kwargs or {})


# -- the recorder --------------------------------------------------------------------------------------


class _Recorder:
    """Notes what one run of a loader does.

    Attributes:
        tainted: Parameters that the loader computes, by name, and the operation.
        used: Which elements of each source are read.
        writes: Which elements of each parameter are copied to, filled, and computed.
    """

    def __init__(self, model: torch.nn.Module, manifest: Manifest) -> None:
        self._model = model
        self._manifest = manifest
        self._lock = threading.RLock()  # a loader may run in threads
        self.live = written(model)
        self._storages = {_storage(tensor): name for name, tensor in reversed(self.live.items())}
        self._index = {name: index for index, name in enumerate(self.live)}
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.tainted: dict[str, str] = {}
        self.through_loader: dict[int, str] = {}
        self.used: dict[int, Extents] = {}
        self.copied: dict[str, Extents] = {}
        self.filled: dict[str, Extents] = {}
        self._computed: dict[str, Extents] = {}
        self._writers: dict[str, set[int]] = {}  # sources by parameter
        self._marks: dict[float | int, _Described] = {}
        self._results: dict[int, tuple[StorageWeakRef, set[int], set[str], str]] = {}  # real tensors computed here
        self._read_back: set[str] = set()  # parameters that something else is computed from
        self._sources = [self._describe(index) for index in range(len(manifest.entries))]

    def run(self) -> None:
        """Run the loader. Raises `MismatchError` where it objects."""
        pairs = [(entry.name, source) for entry, source in zip(self._manifest.entries, self._sources, strict=True)]
        data = {name: parameter.data for name, parameter in self._model.named_parameters()}
        try:
            with _Mode(self):
                self._model.load_weights(pairs)  # type: ignore[operator]
        except Exception as error:
            reason = f"the model's loader objects: {type(error).__name__}: {error}"
            raise MismatchError(reason, stage="begin") from error
        finally:
            for name, parameter in self._model.named_parameters():
                if isinstance(parameter.data, _Described) or parameter.data_ptr() != data[name].data_ptr():
                    parameter.data = data[name]  # a loader that swaps storage: undo, it is unwritten below

    def plan(self) -> CopyPlan:
        """What was noted, in its final form."""
        entries = self._manifest.entries
        through = {entries[i].name: why for i, why in sorted(self.through_loader.items())}
        copies = [copy for copy in self.copies if copy.source not in self.through_loader]
        partial = {}
        for index, extents in self.used.items():
            count = math.prod(entries[index].shape)
            if index not in self.through_loader and extents.count() != count:
                partial[entries[index].name] = tuple(extents.regions)
        unused = [i for i, entry in enumerate(entries) if entry.nbytes and not self._is_used(i)]
        reasons = {entries[i].name: _skip_reason(self._model, entries[i].name) for i in unused}
        return CopyPlan(
            layout=self._manifest.layout_id(),
            parameters=tuple(live_of(name, tensor) for name, tensor in self.live.items()),
            copies=tuple(sorted(copies, key=lambda copy: (copy.source, copy.read.offset))),
            fills=tuple(self.fills),
            through_loader=through,
            partial=partial,
            skipped={name: reason for name, reason in reasons.items() if reason},
            refreshes=bool(self.stale),
        )

    @property
    def stale(self) -> list[str]:
        """Parameters that get new values by copying and from which the loader has computed something else."""
        return sorted((self._read_back & self._writers.keys()) - self.tainted.keys())

    def _is_used(self, index: int) -> bool:
        return index in self.used or index in self.through_loader

    def covered(self, name: str) -> bool:
        """Whether every element of a parameter is written."""
        tensor = self.live[name]
        home = self._storages[_storage(tensor)]
        extents = Extents()
        for kind in (self.copied, self.filled, self._computed):
            extents.regions += kind.get(home, Extents()).regions
        return not tensor.numel() or extents.cover(self._region(tensor))

    def repeated(self, name: str) -> bool:
        """Whether two copies write one element."""
        extents = self.copied.get(name)
        return extents is not None and extents.repeats()

    def _describe(self, index: int) -> _Described:
        entry = self._manifest.entries[index]
        inner = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        return _Described.make(inner, _Origin(source=index, sources={index}), self)

    # -- operations --------------------------------------------------------------------------------------

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out, look through, or note one operation."""
        with self._lock:
            targets = _mutated(func, args, kwargs)
            if any(self._is_parameter(target) for target in targets):
                self._write(func, args, kwargs, targets)
                return args[0]
            described = _described((args, kwargs))
            if not described:
                return self._real(func, args, kwargs, targets)
            if targets:
                return self._scribble(func, args, described, targets)
            return self._derive(func, args, kwargs, described)

    def _is_parameter(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, _Described) and _storage(tensor) in self._storages

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[torch.Tensor]) -> None:
        """Note a write into a parameter."""
        _check_shapes(func, args, kwargs)
        value = args[1] if len(args) > 1 else None
        if func is _aten.copy_.default and isinstance(value, _Described):
            self._copy(targets[0], value)
            return
        if func in _CONSTANTS and not _described((args, kwargs)):
            self._fill(targets[0], 0 if value is None else value)
            return
        sources, read = self._origins((args, kwargs))
        for target in targets:
            if not isinstance(target, _Described) and self._is_parameter(target):
                self._compute(target, sources | read, str(func))

    def _copy(self, target: torch.Tensor, value: _Described) -> None:
        name = self._storages[_storage(target)]
        if value.shape != target.shape:  # a copy broadcasts
            value = value.expand(target.shape)  # type: ignore[assignment]
        try:
            found = _resolved(value, self._region(target), target.dtype)
        except UnevenError as why:
            self._compute(target, value.origin.sources, str(why))
            return
        for source, read, write in found:
            read, write = paired(read, write)
            self.copies.append(Copy(source, self._index[name], read, write))
            self.used.setdefault(source, Extents()).add(read)
            self.copied.setdefault(name, Extents()).add(write)
            self._writers.setdefault(name, set()).add(source)
            if name in self.tainted:
                self.through_loader.setdefault(source, f"{name} is computed ({self.tainted[name]})")

    def _fill(self, target: torch.Tensor, value: Any) -> None:
        marked = self._marks.get(value)
        if marked is not None:
            self._copy(target, marked.view(()) if target.dim() == 0 else marked)  # type: ignore[arg-type]
            return
        name = self._storages[_storage(target)]
        region = self._region(target)
        if name in self.copied and Extents([*self.copied[name].regions, region]).repeats():
            self._compute(target, set(), "filled after it was copied to")
            return
        self.fills.append(Fill(self._index[name], region, value))
        self.filled.setdefault(name, Extents()).add(region)

    def _compute(self, target: torch.Tensor, sources: set[int], why: str) -> None:
        """Note that a parameter is computed: all that ever reached it goes through the loader."""
        name = self._storages[_storage(target)]
        self.tainted[name] = why
        self._computed.setdefault(name, Extents()).add(self._region(target))
        self._writers.setdefault(name, set()).update(sources)
        for source in self._writers[name]:
            self.through_loader.setdefault(source, f"{name} is computed ({why})")

    def _derive(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], described: list[_Described]) -> Any:
        """Carry out an operation on descriptors."""
        if func is _aten._local_scalar_dense.default:
            return self._number(described[0])
        inner_args, inner_kwargs = tree_map_only(torch.Tensor, _meta, (args, kwargs))
        if "device" in inner_kwargs:
            inner_kwargs = inner_kwargs | {"device": torch.device("meta")}
        if inner_kwargs.get("pin_memory"):
            inner_kwargs = inner_kwargs | {"pin_memory": False}
        result = func(*inner_args, **inner_kwargs)
        if not _tensors(result):
            raise TypeError(f"{func} decides by the values of {self._names(described)}, which are not here yet")
        return tree_map_only(torch.Tensor, lambda out: self._wrap(func, args, out, described), result)

    def _wrap(self, func: Any, args: tuple[Any, ...], out: torch.Tensor, described: list[_Described]) -> _Described:
        for one in described:
            if _storage(out) == _storage(one.shape_only):
                if out.dtype != one.dtype and not one.origin.computed:
                    one = described[0]
                    origin = _Origin(computed=f"bytes read as {out.dtype}", sources=set(one.origin.sources))
                    return _Described.make(out, origin, self)
                return _Described.make(out, one.origin, self)
        sources, _ = self._origins(args)
        computed = next((one.origin.computed for one in described if one.origin.computed), "")
        origin = _Origin(computed=computed or str(func), sources=sources)
        if not computed and func in _SAME:
            order = sorted(range(out.dim()), key=out.stride, reverse=True)  # as it lies in memory
            if out.permute(order).is_contiguous():
                origin = _Origin(pieces=(described[0].permute(order),), sources=sources)  # type: ignore[arg-type]
        elif not computed and func in _JOINED and out.is_contiguous() and _all_of_dtype(args[0], out.dtype):
            dim = int(next(iter(args[1:]), 0)) % out.dim()
            pieces = [t for t in args[0] if t.numel()]
            if func is _aten.stack.default:
                pieces = [t.unsqueeze(dim) for t in pieces]
            origin = _Origin(pieces=tuple(pieces), dim=dim, sources=sources)
        return _Described.make(out, origin, self)

    def _number(self, one: _Described) -> bool | int | float:
        """Stand in for the value of a one-element tensor by a number that can be recognised."""
        if one.numel() != 1 or one.origin.computed:
            raise TypeError(f"the value of {self._names([one])} is read, which is not here yet")
        count = len(self._marks)
        mark: float | int
        mark = 1 + (count + 1) * _MARK_STEP if one.dtype.is_floating_point else _MARK_BASE + count
        self._marks[mark] = one
        for source in one.origin.sources:
            self.used.setdefault(source, Extents())
        return mark

    def _scribble(self, func: Any, args: Any, described: list[_Described], targets: list[torch.Tensor]) -> Any:
        """A write into something that is not a parameter: what it held is computed from here on."""
        sources, _ = self._origins(args)
        for target in targets:
            if isinstance(target, _Described):
                target.origin.computed = target.origin.computed or str(func)
                target.origin.sources |= sources
            else:
                self._results[_storage(target)] = (_weak(target), sources, set(), str(func))
        return args[0]

    def _real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: list[torch.Tensor]) -> Any:
        """An operation on real tensors: carried out; what it makes of parameters or of sources is remembered."""
        sources, names = self._origins((args, kwargs), named=True)
        result = func(*args, **kwargs)
        if not sources and not names:
            return result
        inputs = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for out in [*targets, *_tensors(result)]:
            if _storage(out) not in inputs or any(out is target for target in targets):
                self._results[_storage(out)] = (_weak(out), sources, names, str(func))
                self._read_back |= names
        return result

    def _origins(self, values: Any, *, named: bool = False) -> tuple[set[int], Any]:
        """The sources that operands depend on, and the parameters (by name, or as the sources that reached them)."""
        sources: set[int] = set()
        names: set[str] = set()
        for tensor in _tensors(values):
            if isinstance(tensor, _Described):
                sources |= tensor.origin.sources
                continue
            if self._is_parameter(tensor):
                names.add(self._storages[_storage(tensor)])
            known = self._results.get(_storage(tensor))
            if known is not None and not known[0].expired():
                sources |= known[1]
                names |= known[2]
        if named:
            return sources, names
        return sources, set().union(*(self._writers.get(name, set()) for name in names))

    def _region(self, target: torch.Tensor) -> Region:
        home = self.live[self._storages[_storage(target)]]
        return _region(target, int(home.storage_offset()))

    def _names(self, described: Sequence[_Described]) -> str:
        indices = set().union(*(one.origin.sources for one in described))
        return listed(self._manifest.entries[index].name for index in indices)


# -- looking through copies ----------------------------------------------------------------------------


def _resolved(value: _Described, write: Region, dtype: torch.dtype) -> list[tuple[int, Region, Region]]:
    """Where the elements of a descriptor come from: (source, elements read, elements written)."""
    origin = value.origin
    if origin.computed:
        raise UnevenError(origin.computed)
    if origin.source is not None:
        read = _region(value)
        return [(origin.source, read, write)]
    if value.dtype != dtype and not all(_keeps_values(piece.dtype, value.dtype) for piece in origin.pieces):
        raise UnevenError(f"rounded to {value.dtype} on its way to {dtype}")
    found: list[tuple[int, Region, Region]] = []
    for piece, view, part in _behind(value, write):
        if not part.numel:
            continue
        found += _resolved(_view(piece, view), part, dtype)
    return found


def _behind(value: _Described, write: Region) -> list[tuple[_Described, Region, Region]]:
    """Map a view of a contiguous rearranged copy to views of what was copied, cut where two pieces meet."""
    pieces, dim = value.origin.pieces, value.origin.dim
    shape = list(pieces[0].shape)
    shape[dim] = sum(piece.shape[dim] for piece in pieces)
    view = _region(value)
    start, steps, write = along_axes(view, write, shape)
    moving = [j for j, (axis, _) in enumerate(steps) if axis == dim]
    if len(moving) > 1 and len(pieces) > 1:
        raise UnevenError("a joined tensor folded along the joint")
    found = []
    first = 0
    for piece in pieces:
        end = first + piece.shape[dim]
        offset, cut = list(start), write
        if moving:
            offset[dim], cut = overlap(write, moving[0], start[dim], steps[moving[0]][1], (first, end))
        elif not first <= start[dim] < end:
            cut = Region(write.offset, (0,) * len(steps), write.stride)
        offset[dim] -= first
        base = int(piece.storage_offset()) + sum(i * s for i, s in zip(offset, piece.stride(), strict=True))
        moved = tuple(piece.stride(axis) * step if step else 0 for axis, step in steps)
        found.append((piece, Region(base, cut.size, moved), cut))
        first = end
    return found


def _region(tensor: torch.Tensor, start: int = 0) -> Region:
    """A tensor's elements, counted from element `start` of its storage."""
    return Region(int(tensor.storage_offset()) - start, tuple(tensor.shape), tuple(tensor.stride()))


def _view(piece: _Described, view: Region) -> _Described:
    inner = piece.shape_only.as_strided(view.size, view.stride, view.offset)
    return _Described.make(inner, piece.origin, piece.recorder)


def _keeps_values(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a cast loses nothing, so that casting again is casting once."""
    return torch.promote_types(before, after) == after if before != after else True


# -- completeness --------------------------------------------------------------------------------------


def _check_complete(recorder: _Recorder, plan: CopyPlan, sliced: bool) -> None:
    """Raise `MismatchError` naming every source and parameter for which the plan is not complete."""
    entries = recorder._manifest.entries
    parameters = dict(recorder._model.named_parameters())
    read = {entries[copy.source].name for copy in plan.copies} | plan.through_loader.keys() | plan.skipped.keys()
    ignored = [] if sliced else [e.name for e in entries if e.nbytes and e.name not in read]
    text = faults(
        {
            "the model takes no such tensor": ignored,
            "no tensor writes (all of) the parameter": [n for n in parameters if not recorder.covered(n)],
            "more than one tensor writes the parameter": [
                n for n in parameters if n not in recorder.tainted and recorder.repeated(n)
            ],
            "only a part is used of": [] if sliced else plan.partial,
            "the model computes something from parameters and has no post_load_weights to do it again": []
            if hasattr(recorder._model, "post_load_weights")
            else recorder.stale,
        },
        listed,
    )
    if text:
        raise MismatchError(text, stage="begin")


def _skip_reason(model: torch.nn.Module, name: str) -> str:
    """Why a loader may leave a source out, where that is known; "" where it is not."""
    config = getattr(model, "config", None)
    if name.endswith("lm_head.weight") and getattr(config, "tie_word_embeddings", False):
        return "tied to the embedding"
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from the configuration"
    return ""


# -- small ---------------------------------------------------------------------------------------------


def _check_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what the skipped operation would raise, and for a copy that would repeat its source along a dimension."""
    if func is _aten.copy_.default and args[0].numel() != args[1].numel():
        raise ValueError(f"copies {list(args[1].shape)} into {list(args[0].shape)}")
    shadows = tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), (args, kwargs))
    func(*shadows[0], **shadows[1])


def _all_of_dtype(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    return all(isinstance(tensor, _Described) and tensor.dtype == dtype for tensor in tensors)


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, _Described):
        return tensor.shape_only
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _described(values: Any) -> list[_Described]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, _Described)]


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes, by its schema."""
    values = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return _tensors(values)
