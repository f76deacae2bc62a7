"""Sharded sources: boxes are covered exactly once, plans are cut along them, DTensors say where they lie."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor import Shard as Placed
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from miles_sync.errors import ManifestError
from miles_sync.manifest import TensorMeta, lay_out
from miles_sync.plan import bind
from miles_sync.receivers import Piece, Pieces
from miles_sync.rehearsal import record
from miles_sync.shards import Shard, ShardMeta, cover, local_shards, meta_of, resharded, wanted

SHAPES = {"q": (8, 6), "k": (4, 6), "o": (6, 8), "gate.0": (4, 6), "gate.1": (4, 6), "stacked": (2, 6, 4), "norm": (6,)}


class Rank(torch.nn.Module):
    """One of two ranks of an engine: fused and stacked, split by rows, by columns, transposed."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.qk = torch.nn.Parameter(torch.zeros(6, 6))
        self.o = torch.nn.Parameter(torch.zeros(6, 4))
        self.gate = torch.nn.Parameter(torch.zeros(2, 2, 6))
        self.down = torch.nn.Parameter(torch.zeros(2, 2, 6))
        self.norm = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name == "q":
                self.qk.data[:4].copy_(weight.narrow(0, 4 * self.rank, 4))
            elif name == "k":
                self.qk.data[4:].copy_(weight.chunk(2)[self.rank])
            elif name == "o":
                self.o.data.copy_(weight[:, 4 * self.rank : 4 * self.rank + 4])
            elif name.startswith("gate"):
                self.gate.data[int(name[-1])].copy_(weight.view(2, 2, 6)[:, self.rank])  # every other row
            elif name == "stacked":
                self.down.data.copy_(weight.narrow(2, 2 * self.rank, 2).transpose(1, 2))
            elif name == "norm":
                self.norm.data.copy_(weight)


def _weights() -> dict[str, torch.Tensor]:
    return {name: torch.rand(shape) for name, shape in SHAPES.items()}


def _boxes(rng: random.Random, name: str, tensor: torch.Tensor) -> list[Shard]:
    """Cut a tensor into a grid at random places."""
    cuts = [sorted({0, n, *(rng.randint(0, n) for _ in range(rng.randint(0, 2)))}) for n in tensor.shape]
    shards = []
    for box in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        local = tensor[tuple(slice(low, high) for low, high in box)]
        shards.append(Shard(name, tuple(tensor.shape), tuple(low for low, _ in box), local))
    return shards


def test_any_cut_of_the_tensors_loads_the_same_weights() -> None:
    rng = random.Random(0)
    weights = _weights()
    whole = lay_out([TensorMeta(name, "float32", shape) for name, shape in SHAPES.items()], 0)
    for trial in range(60):
        held: list[list[Shard]] = [[], [], []]
        for name, tensor in weights.items():
            for shard in _boxes(rng, name, tensor):
                for rank in rng.sample(range(3), rng.randint(1, 3)):
                    held[rank].append(shard)
        rng.shuffle(held)
        found = cover([[meta_of(shard) for shard in shards] for shards in held])
        boxes = [box for sent in found.sends for box in sent]
        data = {meta_of(shard): shard.tensor.contiguous() for shards in held for shard in shards}
        manifest = found.manifest(0)
        for rank in (0, 1):
            model, loaded = Rank(rank), Rank(rank)
            loaded.load_weights(list(weights.items()))
            whole_in_their_order = found.whole(0)
            plan = resharded(record(model, whole_in_their_order, sliced=True), whole_in_their_order, boxes)
            assert plan.layout == manifest.layout_id()
            bound = bind(plan, manifest, model)
            bound.begin()
            for index, box in enumerate(boxes):
                if box in wanted(plan, boxes):
                    bound.install(Pieces([Piece(index, 0, data[box])]))
            bound.finish()
            for (name, got), expected in zip(model.named_parameters(), loaded.parameters(), strict=True):
                assert torch.equal(got, expected), (trial, rank, name)
    assert {meta.name for meta in found.tensors} == {entry.name for entry in whole.entries}


def test_a_rank_is_sent_only_what_it_reads() -> None:
    halves = [ShardMeta("q", "float32", (8, 6), (4 * half, 0), (4, 6)) for half in (0, 1)]
    rest = [
        ShardMeta(name, "float32", shape, (0,) * len(shape), shape) for name, shape in SHAPES.items() if name != "q"
    ]
    found = cover([[halves[0], *rest], [halves[1]]])
    boxes = [box for sent in found.sends for box in sent]
    plan = resharded(record(Rank(1), found.whole(0), sliced=True), found.whole(0), boxes)
    assert halves[0] not in wanted(plan, boxes) and halves[1] in wanted(plan, boxes)


def test_replicas_are_sent_once_and_shared_out() -> None:
    norms = [ShardMeta(f"norm.{i}", "float32", (8,), (0,), (8,)) for i in range(6)]
    found = cover([norms, norms])
    assert [len(sent) for sent in found.sends] == [3, 3]
    assert len(found.manifest(3).entries) == 6 and found.manifest(3).version == 3
    assert norms[0].key == "norm.0"
    assert ShardMeta("w", "float32", (8, 2), (4, 0), (4, 2)).key == "w[4:8,0:2]"


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        ([((0, 0), (2, 4)), ((3, 0), (1, 4))], "12 of 16 elements"),
        ([((0, 0), (3, 4)), ((2, 0), (2, 4))], "overlap"),
        ([], "0 of 16|names no"),
    ],
)
def test_what_is_not_covered_exactly_once_is_named(
    boxes: list[tuple[tuple[int, int], tuple[int, int]]], text: str
) -> None:
    other = ShardMeta("v", "float32", (1,), (0,), (1,))
    metas = [ShardMeta("w", "float32", (4, 4), offsets, size) for offsets, size in boxes]
    with pytest.raises(ManifestError, match=text):
        cover([[other, *metas], [ShardMeta("w", "float32", (4, 4), (0, 0), (0, 4))]])


def test_ranks_must_agree_on_a_tensor() -> None:
    with pytest.raises(ManifestError, match="rank 1 has 'w' as float32 \\(8,\\)"):
        cover([[ShardMeta("w", "float32", (4,), (0,), (4,))], [ShardMeta("w", "float32", (8,), (0,), (4,))]])
    with pytest.raises(ManifestError, match="not inside"):
        meta_of(Shard("w", (4,), (2,), torch.zeros(3)))


def test_what_a_loader_computes_with_must_be_whole() -> None:
    class Computing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(4))

        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
            self.w.data.copy_(-dict(weights)["w"].exp())

    boxes = [ShardMeta("w", "float32", (4,), (at,), (2,)) for at in (0, 2)]
    found = cover([boxes])
    with pytest.raises(ManifestError, match="gather this one"):
        resharded(record(Computing(), found.whole(0)), found.whole(0), boxes)


@pytest.fixture
def ranks() -> Iterator[None]:
    """Six ranks of which only this one is real: nothing here communicates."""
    dist.init_process_group("fake", store=FakeStore(), rank=4, world_size=6)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("ranks")
def test_dtensors_say_where_they_lie() -> None:
    mesh = DeviceMesh("cpu", torch.arange(6).view(2, 3))
    for shape in ((7, 5), (6, 3), (2, 9), (1, 1)):
        for placements in itertools.product([Placed(0), Placed(1), Replicate()], repeat=2):
            size, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
            local = torch.rand(size)
            tensor = DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=(shape[1], 1))
            shards = list(local_shards([("w", tensor)]))
            if not local.numel():
                assert not shards
                continue
            [shard] = shards
            assert (shard.shape, shard.offsets) == (shape, tuple(offsets))
            assert torch.equal(shard.tensor, local)
    pending = DTensor.from_local(torch.rand(4), mesh, [Partial(), Replicate()])
    with pytest.raises(ManifestError, match="only Replicate and Shard"):
        list(local_shards([("w", pending)]))


def test_a_plain_tensor_is_a_whole() -> None:
    [shard] = local_shards([("w", torch.rand(2, 3))])
    assert shard.offsets == (0, 0) and meta_of(shard).key == "w"
