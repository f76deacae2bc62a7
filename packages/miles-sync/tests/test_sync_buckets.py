"""Buckets: what is packed is what was given, whatever the cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_sync.buckets import Bucket, cut, pack
from miles_sync.digest import CHUNK_BYTES
from miles_sync.errors import ManifestError
from miles_sync.manifest import describe, lay_out, views
from miles_sync.sources import as_source

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool])


@settings(max_examples=60, deadline=None)
@given(SHAPES, DTYPES, st.integers(1, 700))
def test_any_cut_holds_the_same_bytes(shapes: list[tuple[int, ...]], dtype: torch.dtype, size: int) -> None:
    tensors = {f"t{i}": (torch.rand(shape) * 8).to(dtype) for i, shape in enumerate(shapes)}
    manifest = lay_out([describe(n, t) for n, t in tensors.items()], 0)
    starts = range(0, manifest.total_bytes, size)
    buckets = [Bucket(i, s, min(s + size, manifest.total_bytes)) for i, s in enumerate(starts)]
    if not buckets:
        return  # only empty tensors: nothing to move
    dirty = torch.full((size,), 255, dtype=torch.uint8)  # a reused buffer: gaps must come out zero
    packed = [b.clone() for _, b in pack(manifest, tensors.items(), buckets, lambda b: dirty[: b.nbytes])]
    flat = torch.cat(packed)
    for name, view in views(manifest.entries, flat).items():
        assert torch.equal(view.view(torch.uint8) if view.dim() else view, _bytes(tensors[name], view))
    covered = torch.zeros_like(flat, dtype=torch.bool)
    for entry in manifest.entries:
        covered[entry.offset : entry.offset + entry.nbytes] = True
    assert not flat[~covered].any()


def test_non_contiguous_tensors_travel_in_their_own_order() -> None:
    tensor = torch.arange(12.0).view(3, 4).T
    manifest = lay_out([describe("t", tensor)], 0)
    buckets = cut(manifest.total_bytes)
    buffer = torch.empty(manifest.total_bytes, dtype=torch.uint8)
    list(pack(manifest, [("t", tensor)], buckets, lambda b: buffer))
    assert torch.equal(views(manifest.entries, buffer)["t"], tensor)


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
    buffer = torch.empty(manifest.total_bytes, dtype=torch.uint8)
    with pytest.raises(ManifestError, match=text):
        list(pack(manifest, yields, cut(manifest.total_bytes), lambda b: buffer))


def test_cuts_start_where_digests_may() -> None:
    assert [(b.start, b.stop) for b in cut(2 * CHUNK_BYTES + 64, CHUNK_BYTES)] == [
        (0, CHUNK_BYTES),
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 64),
    ]
    with pytest.raises(ValueError, match="multiple"):
        cut(100, CHUNK_BYTES + 1)


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


def _bytes(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if like.dim() else tensor
