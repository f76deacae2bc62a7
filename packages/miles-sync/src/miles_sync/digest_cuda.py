"""The digest on a device: one Triton kernel over a table of runs, held to `miles_sync.digest` bit by bit.

A program reads `TILE` lanes of one block down its rows, mixes, and writes its two sums; torch adds those up. The table
has, per block, address, bytes left in its run, and position; for `Runs` it is made once and stays on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from miles_sync.digest import BLOCK_BYTES, GOLDEN, LANES, MIX_1, MIX_2, ROWS, Run, Runs

TILE = 1024
"""Lanes of a program: 8 KiB a row, 128 KiB down the rows of a full block."""


def sums(runs: Sequence[Run]) -> torch.Tensor:
    """Both sums over runs, int64 `[2]` on their device, queued on the current stream."""
    table = runs.table if isinstance(runs, Runs) else None
    if table is None:
        table = tabulate(runs).to(runs[0].data.device)
        if isinstance(runs, Runs):
            runs.table = table
    return launch(table)


def tabulate(runs: Sequence[Run]) -> torch.Tensor:
    """The table of runs, int64 `[3, blocks]`, on the host."""
    columns = [np.empty((3, 0), dtype=np.int64)]
    for position, data in runs:
        address, nbytes = data.data_ptr(), data.numel()
        if address % 8 or position % 8:
            raise ValueError(f"a run at address {address}, position {position}: both must be multiples of 8")
        first = np.arange(0, nbytes, BLOCK_BYTES, dtype=np.int64)
        columns.append(np.stack([address + first, np.minimum(nbytes - first, BLOCK_BYTES), (position + first) // 8]))
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(columns, axis=1)))


def launch(table: torch.Tensor) -> torch.Tensor:
    """Run the kernel over a table."""
    blocks = table.shape[1]
    tiles = LANES // TILE
    parts = torch.empty((2, blocks * tiles), dtype=torch.int64, device=table.device)
    with torch.cuda.device(table.device) if table.is_cuda else torch.no_grad():
        kernel: Any = _kernel[(blocks, tiles)]
        kernel(table, parts, blocks, LANES, ROWS, TILE, GOLDEN, MIX_1, MIX_2)
    return parts.sum(1)


@triton.jit
def _kernel(
    table,
    out,
    blocks,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    tiles = LANES // TILE
    address = tl.load(table + block)
    nbytes = tl.load(table + blocks + block)
    position = tl.load(table + 2 * blocks + block)
    lane = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    acc = lane * G
    data = address.to(tl.pointer_type(tl.int64))
    for row in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues] - unrolled by the compiler
        at = row * LANES + lane
        left = nbytes - at * 8
        inside = left > 0
        # The last word may be read beyond its end: allocations are longer than that; what is not ours is masked.
        word = tl.load(data + at, mask=inside, other=0)
        word = tl.where(left < 8, word & ((tl.full([TILE], 1, tl.int64) << (tl.minimum(left, 7) * 8)) - 1), word)
        step = (acc ^ word) * G
        step = step ^ (step >> 32)
        acc = tl.where(inside, step, acc)
    used = lane * 8 < nbytes
    acc = acc ^ ((position + lane) * G)
    acc = acc * M1
    acc = acc ^ (acc >> 31)
    acc = acc * M2
    acc = acc ^ (acc >> 29)
    slot = block * tiles + tl.program_id(1)
    tl.store(out + slot, tl.sum(tl.where(used, acc, 0), 0))
    acc = acc * M1
    acc = acc ^ (acc >> 32)
    tl.store(out + blocks * tiles + slot, tl.sum(tl.where(used, acc, 0), 0))
