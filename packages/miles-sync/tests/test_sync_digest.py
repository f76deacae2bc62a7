"""The digest: every byte, every position, in any order of pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_sync.digest import CHUNK_BYTES, LANES, Digest, digest_of

ROW_BYTES = LANES * 8


def _random(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * LANES // 2), st.data())
def test_any_changed_bit_changes_it(words: int, data: st.DataObject) -> None:
    flat = _random(words * 8)
    before = digest_of(flat, "layout")
    position = data.draw(st.integers(0, words * 8 - 1))
    flat[position] ^= 1 << data.draw(st.integers(0, 7))
    assert digest_of(flat, "layout") != before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 299), st.integers(0, 299), st.integers(0, 7))
def test_two_flipped_bits_do_not_cancel(one: int, other: int, bit: int) -> None:
    """Sign bits of float32 pairs are the classic: modulo 2^64 their changes add up to nothing."""
    flat = torch.zeros(4 * ROW_BYTES, dtype=torch.uint8)
    before = digest_of(flat, "")
    flat[one * 1747 % flat.numel()] ^= 1 << bit
    flat[other * 1747 % flat.numel()] ^= 1 << bit
    assert (digest_of(flat, "") == before) == (one == other)


def test_sign_flips_of_the_same_lane_in_neighbouring_rows_do_not_cancel() -> None:
    flat = _random(4 * ROW_BYTES)
    before = digest_of(flat, "")
    flat[7] ^= 128
    flat[ROW_BYTES + 7] ^= 128
    assert digest_of(flat, "") != before


@pytest.mark.parametrize("unit", [8, ROW_BYTES, CHUNK_BYTES])
def test_swapped_words_rows_and_chunks_change_it(unit: int) -> None:
    flat = _random(2 * unit)
    swapped = torch.cat([flat[unit:], flat[:unit]])
    assert digest_of(flat, "") != digest_of(swapped, "")


def test_length_and_layout_count() -> None:
    flat = torch.zeros(128, dtype=torch.uint8)
    assert len({digest_of(flat, ""), digest_of(flat[:64], ""), digest_of(flat, "other")}) == 3


def test_pieces_in_any_order_give_the_whole() -> None:
    flat = _random(2 * CHUNK_BYTES + 3 * ROW_BYTES + 64)
    pieces = [(start, flat[start : start + CHUNK_BYTES]) for start in range(0, flat.numel(), CHUNK_BYTES)]
    digest = Digest()
    for start, piece in reversed(pieces):
        digest.update(start, piece)
    assert digest.hexdigest("x") == digest_of(flat, "x")


def test_it_does_not_depend_on_the_number_of_threads() -> None:
    flat = _random(CHUNK_BYTES + 8)
    threads = torch.get_num_threads()
    try:
        found = set()
        for count in (1, 2):
            torch.set_num_threads(count)
            found.add(digest_of(flat, ""))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_it_is_the_same_in_every_release() -> None:
    """Digests are compared between processes that may run different releases."""
    flat = (torch.arange(3 * ROW_BYTES + 72) % 251).to(torch.uint8)
    assert digest_of(flat, "0" * 32) == "a1d1c1235cfe40c4045c454f1aa873c4"


def test_odd_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        Digest().update(8, torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiple"):
        Digest().update(0, torch.zeros(7, dtype=torch.uint8))
