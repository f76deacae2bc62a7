"""The copy plan as data: regions, cutting, merging, binding, and all ranks held together."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from miles_sync.errors import ManifestError, MismatchError
from miles_sync.manifest import TensorMeta, lay_out
from miles_sync.plan import Copy, CopyPlan, Extents, Live, Region, bind, clipped, decode, paired, unread
from miles_sync.receivers import Piece, Pieces


def _plan(copies: list[Copy], shapes: dict[str, tuple[int, ...]], layout: str = "", **changes: object) -> CopyPlan:
    fields = {
        "layout": layout,
        "parameters": tuple(Live(name, "float32", shape) for name, shape in shapes.items()),
        "copies": tuple(copies),
        "fills": (),
        "through_loader": {},
        "partial": {},
        "skipped": {},
        "refreshes": False,
    }
    return CopyPlan(**(fields | changes))  # type: ignore[arg-type]


def _elements(region: Region) -> list[int]:
    storage = torch.arange(10_000)
    return storage.as_strided(region.size, region.stride, region.offset).flatten().tolist()


def _random_copy(rng: random.Random) -> Copy:
    """A slice of a tensor into a slice of another, with dimensions permuted."""
    dims = rng.randint(1, 4)
    size = [rng.randint(1, 5) for _ in range(dims)]

    def region() -> Region:
        order = rng.sample(range(dims), dims)
        strides, step = [0] * dims, 1
        for dim in order:
            strides[dim] = step
            step *= size[dim] + rng.choice((0, 0, 2))
        return Region(rng.randint(0, 9), tuple(size), tuple(strides))

    return Copy(0, 0, *paired(region(), region()))


def test_cutting_a_copy_keeps_every_pair_of_elements() -> None:
    rng = random.Random(0)
    for _ in range(400):
        copy = _random_copy(rng)
        pairs = dict(zip(_elements(copy.write), _elements(copy.read), strict=True))
        cuts = sorted({0, 10_000, *(rng.randint(0, 700) for _ in range(rng.randint(0, 4)))})
        found: dict[int, int] = {}
        for start, stop in itertools.pairwise(cuts):
            for part in clipped(copy, start, stop):
                reads = _elements(part.read)
                assert all(start <= at < stop for at in reads)
                found |= dict(zip(_elements(part.write), reads, strict=True))
        assert found == pairs


def test_contiguous_regions_become_one_run() -> None:
    read, write = paired(Region(3, (2, 1, 4), (4, 7, 1)), Region(9, (2, 1, 4), (4, 1, 1)))
    assert (read, write) == (Region(3, (8,), (1,)), Region(9, (8,), (1,)))
    sliced = Region(0, (2, 4), (8, 1))
    assert paired(sliced, Region(0, (2, 4), (4, 1)))[0] == sliced


def test_extents_count_cover_and_notice_repeats() -> None:
    rows, columns = Region(0, (2, 4), (4, 1)), Region(8, (2, 2), (4, 1))
    extents = Extents([rows, columns])
    assert extents.count() == 12 and not extents.repeats()
    assert extents.cover(Region(0, (8,), (1,))) and not extents.cover(Region(0, (12,), (1,)))
    assert extents.cover(Region(8, (2, 2), (4, 1)))
    extents.add(Region(13, (1,), (1,)))
    assert extents.repeats()
    dense = Extents([Region(0, (4,), (1,)), Region(4, (4,), (1,))])
    assert dense.cover(Region(0, (2, 4), (1, 2))) and not dense.cover(Region(0, (9,), (1,)))


def test_a_plan_travels_as_data() -> None:
    plan = _plan([Copy(0, 0, Region(0, (4,), (1,)), Region(0, (4,), (1,)))], {"w": (4,)})
    assert decode(plan.encode()) == plan
    assert decode(plan.encode()).digest() == plan.digest()
    for broken in (b"", b"no plan", plan.encode()[:-3]):
        with pytest.raises(ManifestError):
            decode(broken)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2, 4))


def test_a_plan_binds_to_what_it_was_recorded_for_alone() -> None:
    manifest = lay_out([TensorMeta("a", "float32", (4,)), TensorMeta("b", "float32", (4,))], 0)
    run = Region(0, (4,), (1,))
    copies = [Copy(0, 0, run, run), Copy(1, 0, run, Region(4, (4,), (1,)))]
    layout = manifest.layout_id()
    with pytest.raises(MismatchError, match="another layout"):
        bind(_plan(copies, {"w": (2, 4)}, "other"), manifest, _Model())
    with pytest.raises(MismatchError, match="is missing"):
        bind(_plan(copies, {"v": (2, 4)}, layout), manifest, _Model())
    with pytest.raises(MismatchError, match="float32"):
        bind(_plan(copies, {"w": (4, 4)}, layout), manifest, _Model())


def test_neighbours_are_merged_and_worked_out_once() -> None:
    manifest = lay_out([TensorMeta(name, "float32", (16,)) for name in "ab"], 0)

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(32))

    run = Region(0, (16,), (1,))
    copies = [Copy(0, 0, run, run), Copy(1, 0, run, Region(16, (16,), (1,)))]
    model = Wide()
    bound = bind(_plan(copies, {"w": (32,)}, manifest.layout_id()), manifest, model)
    flat = torch.arange(32, dtype=torch.float32)
    pieces = Pieces([Piece(0, 0, flat[:16]), Piece(1, 0, flat[16:])])
    bound.install(pieces)
    assert model.w.tolist() == flat.tolist()
    memo = pieces.memo
    assert memo is not None and [len(targets) for targets, _ in memo[1]] == [1]
    flat.add_(5)  # the same memory with the next version
    bound.install(pieces)
    assert model.w.tolist() == flat.tolist() and pieces.memo is memo


def test_all_ranks_together_must_read_everything() -> None:
    manifest = lay_out([TensorMeta("a", "float32", (4, 4))], 0)
    whole = Region(0, (16,), (1,))
    left, right = Region(0, (4, 2), (4, 1)), Region(2, (4, 2), (4, 1))
    ranks = [
        _plan([Copy(0, 0, half, Region(0, (8,), (1,)))], {"w": (4, 2)}, partial={"a": (half,)})
        for half in (left, right)
    ]
    assert unread(ranks, manifest) == []
    assert unread(ranks[:1], manifest) == unread([ranks[0], ranks[0]], manifest) == ["a"]
    assert unread([_plan([Copy(0, 0, whole, whole)], {"w": (4, 4)})], manifest) == []
    assert unread([_plan([], {})], manifest) == ["a"]
    assert unread([_plan([], {}, skipped={"a": "tied"})], manifest) == []
