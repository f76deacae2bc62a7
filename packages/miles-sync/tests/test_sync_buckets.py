"""Buckets: what is packed is what was given, whatever the cut."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_sync import buckets as buckets_module
from miles_sync.buckets import Packer, as_bytes, check_length, cut, pieces, within
from miles_sync.digest import BLOCK_BYTES
from miles_sync.errors import ManifestError
from miles_sync.manifest import Manifest, TensorMeta, describe, lay_out, views
from miles_sync.shared import SharedArena
from miles_sync.sources import as_source

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool])


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.booleans(), st.sampled_from([64, 128, 192]))
def test_any_cut_holds_the_same_bytes(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, held: bool, block: int
) -> None:
    tensors = {f"t{i}": (torch.rand(shape) * 8).to(dtype) for i, shape in enumerate(shapes)}
    manifest = lay_out([describe(n, t) for n, t in tensors.items()], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets_module, "BLOCK_BYTES", block)
        packer = Packer(manifest, 2 * block)
    dirty = torch.full((2 * block,), 255, dtype=torch.uint8)  # a reused buffer
    found: dict[int, list[torch.Tensor]] = {}
    end = 0
    packed = (
        packer.pack_held(list(tensors.values()), lambda b: dirty[: b.nbytes])
        if held
        else packer.pack(tensors.items(), lambda b: dirty[: b.nbytes])
    )
    for bucket, buffer in packed:
        assert bucket.start == end and 0 < bucket.nbytes <= 2 * block
        end = bucket.stop
        for piece in pieces(manifest, bucket.parts, within(buffer, bucket)):
            assert piece.start == sum(part.numel() for part in found.get(piece.index, []))
            found.setdefault(piece.index, []).append(piece.data.clone())
    assert end == manifest.total_bytes
    for index, tensor in enumerate(tensors.values()):
        if tensor.numel():
            arrived = torch.cat([part.reshape(-1) for part in found[index]]).view(tensor.shape)
            assert arrived.dtype == dtype and torch.equal(as_bytes(arrived), as_bytes(tensor))


def _packed(tensors: Iterable[tuple[str, torch.Tensor]], manifest: Manifest) -> torch.Tensor:
    buffer = torch.zeros(manifest.total_bytes, dtype=torch.uint8)
    list(Packer(manifest, BLOCK_BYTES).pack(tensors, lambda b: buffer))
    return buffer


def test_non_contiguous_tensors_travel_in_their_own_order() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    manifest = lay_out([describe("t", tensor)], 0)
    assert torch.equal(views(manifest.entries, _packed([("t", tensor)], manifest))["t"], tensor)


@pytest.mark.parametrize(
    ("yields", "text"),
    [
        ([], "ended before 'a'"),
        ([("a", torch.zeros(3))], "ended before 'b'"),
        ([("a", torch.zeros(3)), ("c", torch.zeros(2))], "yields 'c'"),
        ([("a", torch.zeros(4))], "yields 'a' float32"),
        ([("a", torch.zeros(3).half())], "float16"),
        ([("a", torch.zeros(3)), ("b", torch.zeros(2)), ("c", torch.zeros(2))], "beyond its metadata"),
    ],
)
def test_a_source_that_breaks_its_word_is_named(yields: list[tuple[str, torch.Tensor]], text: str) -> None:
    manifest = lay_out([describe("a", torch.zeros(3)), describe("b", torch.zeros(2))], 0)
    with pytest.raises(ManifestError, match=text):
        _packed(yields, manifest)


def test_tensors_are_cut_where_digests_may_start_and_both_sides_agree() -> None:
    sizes = {"a": 100, "b": 3 * BLOCK_BYTES, "c": 7}
    cuts = cut(lay_out([TensorMeta(name, "uint8", (size,)) for name, size in sizes.items()], 0), 2 * BLOCK_BYTES)
    assert [[(p.index, p.start, p.nbytes) for p in b.parts] for b in cuts] == [
        [(0, 0, 100), (1, 0, BLOCK_BYTES)],
        [(1, BLOCK_BYTES, 2 * BLOCK_BYTES)],
        [(2, 0, 7)],
    ]
    assert [b.start for b in cuts] == [0, 128 + BLOCK_BYTES, 128 + 3 * BLOCK_BYTES]
    with pytest.raises(ValueError, match="multiple"):
        check_length(BLOCK_BYTES + 1)


def test_what_lives_in_its_place_is_not_copied() -> None:
    arena = SharedArena([TensorMeta("a", "float32", (3,))])
    arena.tensors["a"].fill_(2)
    manifest = lay_out(arena.metadata(), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets_module, "copy_all", lambda places, sources: pytest.fail("it was copied"))
        list(Packer(manifest, BLOCK_BYTES).pack_held(arena.held(), lambda b: arena.segment.data[b.start : b.stop]))
    arena.segment.close()


def test_tied_parameters_are_sent_once_and_transient_buffers_not() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(4, 2)
            self.head = torch.nn.Linear(2, 4, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    assert [meta.name for meta in as_source(Tied()).metadata()] == ["embed.weight", "kept"]
