"""Sharded weights: every rank names the boxes of global tensors that it holds, and nobody gathers.

    metas of each rank ──cover──▶ Cover: each element exactly once, replicas sent by one rank alone
    CopyPlan over whole tensors ──resharded──▶ CopyPlan over the boxes

A receiver records its plan against whole tensors, for that is what its model's loader knows; `resharded` cuts each copy
along the boxes that the senders hold. What no copy of a receiver reads, it need not be sent (`wanted`): a
tensor-parallel engine gets its slices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate
from torch.distributed.tensor.placement_types import Shard as ShardPlacement

from miles_sync.errors import ManifestError
from miles_sync.manifest import Entry, Manifest, TensorMeta, describe, lay_out
from miles_sync.plan import Copy, CopyPlan, Region, UnevenError, along_axes, overlap, paired


class Shard(NamedTuple):
    """A box of a global tensor, with its elements.

    Attributes:
        name: Of the whole tensor.
        shape: Of the whole tensor.
        offsets: The box's first index, one number a dimension.
        tensor: Its elements: as many dimensions as the whole has.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: torch.Tensor


class ShardMeta(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A box of a global tensor: its name, dtype (a key of `DTYPES`) and shape, where the box starts, and its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def key(self) -> str:
        """The name under which the box travels: the tensor's own if it is all of it."""
        if self.size == self.shape:
            return self.name
        return f"{self.name}[{','.join(f'{o}:{o + n}' for o, n in zip(self.offsets, self.size, strict=True))}]"

    @property
    def meta(self) -> TensorMeta:
        """What travels, as a tensor."""
        return TensorMeta(self.key, self.dtype, self.size)


def meta_of(shard: Shard) -> ShardMeta:
    """Take a shard's metadata. Raises `ManifestError` for a box outside its tensor."""
    local = describe(shard.name, shard.tensor)
    shape, offsets = tuple(shard.shape), tuple(shard.offsets)
    ranks = len(shape) == len(offsets) == len(local.shape)
    if not ranks or any(o < 0 or o + n > s for o, n, s in zip(offsets, local.shape, shape, strict=True)):
        reason = f"shard {shard.name!r} of size {local.shape} at {offsets} is not inside {shape}"
        raise ManifestError(reason, stage="begin")
    return ShardMeta(shard.name, local.dtype, shape, offsets, local.shape)


def local_shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Shard]:
    """The boxes that this rank holds of named tensors, some of which may be DTensors; nothing is communicated.

    A plain tensor is a box that is all of its tensor. Raises `ManifestError` for a DTensor with pending sums or with
    strided shards, whose elements are no box.
    """
    for name, tensor in tensors:
        if not isinstance(tensor, DTensor):
            yield Shard(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach())
            continue
        shape = tuple(tensor.shape)
        coordinate = tensor.device_mesh.get_coordinate()
        if coordinate is None:
            continue  # this rank is outside the mesh
        box = _box(name, shape, tensor.placements, tensor.device_mesh.shape, coordinate)
        local = tensor.to_local().detach()
        if tuple(local.shape) != box[1]:
            reason = f"{name!r} holds {tuple(local.shape)} where its placements {tensor.placements} say {box[1]}"
            raise ManifestError(reason, stage="begin")
        if local.numel():
            yield Shard(name, shape, box[0], local)


def _box(
    name: str, shape: Sequence[int], placements: Sequence[Placement], mesh: Sequence[int], coordinate: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and size of a rank's part: each sharding cuts what the one before left, in chunks of ceil(n / ranks)."""
    offsets, size = [0] * len(shape), list(shape)
    for placement, ranks, rank in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not ShardPlacement:
            reason = f"{name!r} is placed as {placement}: only Replicate and Shard can be sent where they lie"
            raise ManifestError(reason, stage="begin")
        dim = placement.dim % len(shape)
        chunk = -(-size[dim] // ranks)
        first = min(chunk * rank, size[dim])
        offsets[dim] += first
        size[dim] = min(chunk, size[dim] - first)
    return tuple(offsets), tuple(size)


@dataclass(frozen=True)
class Cover:
    """Who sends what.

    Attributes:
        tensors: The whole tensors, in the order in which the ranks name them.
        sends: By rank, the boxes that it sends: together they are each element of each tensor once.
    """

    tensors: tuple[TensorMeta, ...]
    sends: tuple[tuple[ShardMeta, ...], ...]

    def manifest(self, version: int) -> Manifest:
        """The manifest of the boxes, rank after rank: what travels."""
        return lay_out((box.meta for boxes in self.sends for box in boxes), version)

    def whole(self, version: int) -> Manifest:
        """The manifest of whole tensors: what a receiver records its plan against. It need not be held anywhere."""
        return lay_out(self.tensors, version)


def cover(ranks: Sequence[Iterable[ShardMeta]]) -> Cover:
    """Hold all ranks' boxes together.

    A box that several ranks hold (data parallel replicas, norms under tensor parallelism) is sent by the one of them
    with the least to send so far. Raises `ManifestError` where ranks disagree on a tensor, where boxes overlap
    otherwise, and where some element is held by nobody.
    """
    wholes: dict[str, TensorMeta] = {}
    holders: dict[ShardMeta, list[int]] = {}
    for rank, boxes in enumerate(ranks):
        for box in boxes:
            whole = wholes.setdefault(box.name, TensorMeta(box.name, box.dtype, box.shape))
            if (whole.dtype, whole.shape) != (box.dtype, box.shape):
                reason = (
                    f"rank {rank} has {box.name!r} as {box.dtype} {box.shape}, others as {whole.dtype} {whole.shape}"
                )
                raise ManifestError(reason, stage="begin")
            if math.prod(box.size):
                holders.setdefault(box, []).append(rank)
    _check_exactly_once(wholes, holders)
    load = [0] * len(ranks)
    sends: list[list[ShardMeta]] = [[] for _ in ranks]
    for box, held_by in holders.items():
        rank = min(held_by, key=lambda r: (load[r], r))
        load[rank] += box.meta.nbytes
        sends[rank].append(box)
    return Cover(tuple(wholes.values()), tuple(map(tuple, sends)))


def _check_exactly_once(wholes: Mapping[str, TensorMeta], boxes: Iterable[ShardMeta]) -> None:
    by_name: dict[str, list[ShardMeta]] = {name: [] for name in wholes}
    for box in boxes:
        for other in by_name[box.name]:
            if _meet(box, other):
                raise ManifestError(f"{box.key} and {other.key} overlap and are not the same box", stage="begin")
        by_name[box.name].append(box)
    for name, found in by_name.items():
        held, all_of_it = sum(math.prod(box.size) for box in found), math.prod(wholes[name].shape)
        if held != all_of_it:
            reason = f"{name!r}: {held} of {all_of_it} elements are held by some rank"
            raise ManifestError(reason, stage="begin")


def _meet(one: ShardMeta, other: ShardMeta) -> bool:
    spans = zip(one.offsets, one.size, other.offsets, other.size, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in spans)


def resharded(plan: CopyPlan, whole: Manifest, boxes: Sequence[ShardMeta]) -> CopyPlan:
    """Turn a plan over whole tensors into the same plan over boxes of them.

    Args:
        plan: Recorded against `whole`.
        whole: Manifest of whole tensors.
        boxes: That together are all of them, in the order of the manifest that will travel.

    Returns:
        A plan for `lay_out(box.meta for box in boxes)`. Raises `ManifestError` where a tensor that goes through the
        model's own loader is cut into several boxes: a loader takes whole tensors.
    """
    index = {entry.name: i for i, entry in enumerate(whole.entries)}
    by_tensor: dict[int, list[tuple[int, ShardMeta]]] = {}
    for position, box in enumerate(boxes):
        by_tensor.setdefault(index[box.name], []).append((position, box))
        if box.name in plan.through_loader and box.key != box.name:
            reason = (
                f"{box.key}: its model's loader computes with all of {box.name!r} ({plan.through_loader[box.name]})"
            )
            raise ManifestError(f"{reason}; gather this one", stage="begin")
    copies: list[Copy] = []
    for copy in plan.copies:
        entry = whole.entries[copy.source]
        for position, box in by_tensor.get(copy.source, ()):
            copies += _inside(copy, entry, position, box)
    keys = {box.name: box.key for box in boxes if box.name in plan.skipped}
    return msgspec.structs.replace(
        plan,
        layout=lay_out((box.meta for box in boxes), 0).layout_id(),
        copies=tuple(sorted(copies, key=lambda copy: (copy.source, copy.read.offset))),
        partial={},
        skipped={keys[name]: reason for name, reason in plan.skipped.items() if name in keys},
    )


def wanted(plan: CopyPlan, boxes: Sequence[ShardMeta]) -> list[ShardMeta]:
    """The boxes of which a resharded plan reads anything: the only ones that its receiver must be sent."""
    read = {copy.source for copy in plan.copies}
    return [box for i, box in enumerate(boxes) if i in read or box.name in plan.through_loader]


def _inside(copy: Copy, entry: Entry, position: int, box: ShardMeta) -> list[Copy]:
    """The part of a copy that reads from a box, in the box's own coordinates."""
    if box.size == box.shape:
        return [Copy(position, copy.parameter, copy.read, copy.write)]
    try:
        start, steps, write = along_axes(copy.read, copy.write, entry.shape)
    except UnevenError as error:
        raise ManifestError(f"{box.key}: {error}", stage="begin") from error
    strides = [math.prod(box.size[axis + 1 :]) for axis in range(len(box.size))]
    found: list[Copy] = []
    _cut(found, copy, position, box, strides, start, steps, write, set())
    return found


def _cut(
    found: list[Copy],
    copy: Copy,
    position: int,
    box: ShardMeta,
    strides: Sequence[int],
    start: list[int],
    steps: list[tuple[int, int]],
    write: Region,
    done: set[int],
) -> None:
    """Clip dimension by dimension; where two move along one axis, the longer step is taken index by index."""
    for j, (axis, step) in enumerate(steps):
        if j in done or not step:
            continue
        if any(
            k != j and other == axis and less and less <= step for k, (other, less) in enumerate(steps) if k not in done
        ):
            for i in range(write.size[j]):
                size = (*write.size[:j], 1, *write.size[j + 1 :])
                one = Region(write.offset + i * write.stride[j], size, write.stride)
                at = [s + (i * step if a == axis else 0) for a, s in enumerate(start)]
                fixed = [*steps[:j], (axis, 0), *steps[j + 1 :]]
                _cut(found, copy, position, box, strides, at, fixed, one, done | {j})
            return
        span = (box.offsets[axis], box.offsets[axis] + box.size[axis])
        start = list(start)
        start[axis], write = overlap(write, j, start[axis], step, span)
        done = done | {j}
    local = [index - first for index, first in zip(start, box.offsets, strict=True)]
    inside = all(0 <= index < size for index, size in zip(local, box.size, strict=True))
    if write.numel and inside:
        offset = sum(index * stride for index, stride in zip(local, strides, strict=True))
        read = Region(offset, write.size, tuple(strides[axis] * step for axis, step in steps))
        found.append(Copy(position, copy.parameter, *paired(read, write)))
