"""The digest: every byte, every position, in any order of pieces."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_sync.digest import BLOCK_BYTES, LANES, Digest, Run, digest_of

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


@pytest.mark.parametrize("unit", [8, ROW_BYTES, BLOCK_BYTES])
def test_swapped_words_rows_and_blocks_change_it(unit: int) -> None:
    flat = _random(2 * unit)
    swapped = torch.cat([flat[unit:], flat[:unit]])
    assert digest_of(flat, "") != digest_of(swapped, "")


def test_swapped_tensors_change_it() -> None:
    one, other = _random(800, 1), _random(800, 2)
    digests = set()
    for first, second in ((one, other), (other, one)):
        digest = Digest()
        digest.update([Run(0, first), Run(832, second)])
        digests.add(digest.hexdigest(""))
    assert len(digests) == 2


def test_position_and_layout_count() -> None:
    flat = _random(128)
    digest = Digest()
    digest.update([Run(64, flat)])
    assert len({digest_of(flat, ""), digest_of(flat, "other"), digest.hexdigest("")}) == 3


def test_runs_in_any_order_give_the_whole() -> None:
    flat = _random(2 * BLOCK_BYTES + 3 * ROW_BYTES + 61)
    runs = [Run(start, flat[start : start + BLOCK_BYTES]) for start in range(0, flat.numel(), BLOCK_BYTES)]
    digest = Digest()
    digest.update(runs[::-1])
    assert digest.hexdigest("x") == digest_of(flat, "x")


def test_it_does_not_matter_what_lies_behind_the_last_byte() -> None:
    flat = _random(803)
    assert digest_of(flat[:795], "") == digest_of(flat[:795].clone(), "")


def test_it_does_not_depend_on_the_number_of_threads() -> None:
    flat = _random(BLOCK_BYTES + 8)
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
    assert digest_of(flat, "0" * 32) == "548b15b48b045391a97d0e916b5fa7f6"


def test_the_kernel_for_devices_gives_the_same_sums() -> None:
    """Run by Triton's interpreter, which must be chosen before triton is loaded: in a process of its own."""
    pytest.importorskip("triton", reason="torch without a device comes without triton")
    code = (
        "import torch\n"
        "from miles_sync import digest_cuda\n"
        "from miles_sync.digest import BLOCK_BYTES, Digest, Run\n"
        "flat = torch.randint(0, 256, (BLOCK_BYTES + 90000,), dtype=torch.uint8)\n"
        "cuts = ((0, BLOCK_BYTES + 64), (BLOCK_BYTES + 64, BLOCK_BYTES + 867), (BLOCK_BYTES + 896, flat.numel() - 3))\n"
        "runs = [Run(start, flat[start:stop]) for start, stop in cuts]\n"
        "digest = Digest()\n"
        "digest.update(runs)\n"
        "digest._device = -digest_cuda.launch(digest_cuda.tabulate(runs))\n"
        "assert digest.hexdigest('') == Digest().hexdigest('')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_addresses_that_words_cannot_be_read_from_are_refused() -> None:
    pytest.importorskip("triton", reason="torch without a device comes without triton")
    from miles_sync.digest_cuda import tabulate  # noqa: PLC0415 - needs triton

    with pytest.raises(ValueError, match="multiples of 8"):
        tabulate([Run(4, torch.zeros(8, dtype=torch.uint8))])
