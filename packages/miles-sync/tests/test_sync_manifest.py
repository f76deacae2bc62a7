"""The manifest: layouts hold their rules, and nothing malformed is decoded."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_sync.errors import ManifestError
from miles_sync.manifest import ALIGNMENT, DTYPES, Entry, Manifest, TensorMeta, decode, describe, encode, lay_out, views

METAS = st.lists(
    st.builds(
        TensorMeta,
        name=st.text(min_size=1, max_size=20),
        dtype=st.sampled_from(sorted(DTYPES)),
        shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda meta: meta.name,
)


@given(METAS)
def test_layout_is_aligned_gapless_and_survives_the_wire(metas: list[TensorMeta]) -> None:
    manifest = lay_out(metas, version=3)
    end = 0
    for meta, entry in zip(metas, manifest.entries, strict=True):
        assert entry.offset % ALIGNMENT == 0 and 0 <= entry.offset - end < ALIGNMENT
        assert entry.nbytes == math.prod(meta.shape) * DTYPES[meta.dtype].itemsize
        end = entry.offset + entry.nbytes
    assert manifest.total_bytes % ALIGNMENT == 0
    assert decode(encode(manifest)) == manifest
    flat = torch.zeros(manifest.total_bytes, dtype=torch.uint8)
    cut = views(manifest.entries, flat)
    assert {name: (view.dtype, tuple(view.shape)) for name, view in cut.items()} == {
        meta.name: (DTYPES[meta.dtype], meta.shape) for meta in metas
    }


@given(METAS, METAS)
def test_layout_id_tells_layouts_apart(one: list[TensorMeta], other: list[TensorMeta]) -> None:
    same = lay_out(one, 0).layout_id() == lay_out(other, 1).layout_id()
    assert same == (one == other)


GOOD = Manifest(1, (Entry("a", "float32", (2, 3), 0, 24), Entry("b", "int8", (5,), 64, 5)), 128)


@pytest.mark.parametrize(
    "change",
    [
        {"version": -1},
        {"version": "1"},
        {"version": 1.0},
        {"entries": []},
        {"total_bytes": 192},
        {"total_bytes": 64},
        {"digest": "beef"},
        {"digest": "Z" * 32},
        {"extra": 1},
    ],
)
def test_wrong_fields_are_refused(change: dict[str, object]) -> None:
    fields = msgspec.to_builtins(GOOD) | change
    with pytest.raises(ManifestError):
        decode(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    "entry",
    [
        ["a", "float32", [2, 3], 64, 24],  # leaves a hole before it
        ["a", "float32", [2, 3], 0, 20],  # shorter than its shape
        ["a", "float32", [2, -3], 0, 24],
        ["a", "float99", [2, 3], 0, 24],
        ["", "float32", [2, 3], 0, 24],
        ["a" * 513, "float32", [2, 3], 0, 24],
        ["b", "float32", [2, 3], 0, 24],  # a name twice
        ["a", "float32", [1] * 9, 0, 4],
        ["a", "float32", [2, 3], 0, 24, "more"],
        ["a", "float32", [1 << 40, 1 << 40], 0, (1 << 63) - 1],  # overflows where products are not exact
        ["a", "int8", [1 << 45], 0, 1 << 45],
        ["a", "float32"],
        "a",
    ],
)
def test_wrong_entries_are_refused(entry: object) -> None:
    fields = msgspec.to_builtins(GOOD)
    fields["entries"] = [entry, ["b", "int8", [5], 64, 5]]
    with pytest.raises(ManifestError):
        decode(msgspec.msgpack.encode(fields))


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        decode(data)


def test_dtypes_that_do_not_travel_are_named() -> None:
    with pytest.raises(ManifestError, match="complex64"):
        describe("z", torch.zeros(2, dtype=torch.complex64))
