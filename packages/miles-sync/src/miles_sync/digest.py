"""A digest over every byte and its position, in integer operations that any device has.

Why not a cryptographic hash: on one core SHA-256 and BLAKE2 read 1 to 2 GB/s and neither runs on a device. This
digest is for corruption and programming errors, not for adversaries (the token keeps those out).

Every tensor is read in blocks of `ROWS` rows of `LANES` little-endian int64 words, counted from its own start, so it
does not matter where its bytes lie: in a bucket, in the trainer's parameter, or in shared memory. Within a block each
lane is a chain, modulo 2^64:

    acc[j] = j * G;   per row r:   acc[j] = (acc[j] ^ word[r, j]) * G;   acc[j] ^= acc[j] >> 32

G is odd, so a changed word changes its lane before the shift. The (arithmetic) shift brings high bits down: without
it two flipped sign bits cancel in any sum or product modulo 2^64. It maps x and its complement to the same value: of
2^64 changes of a word one goes unseen. Then each lane is mixed with its position in the flat buffer, twice, and both
are summed over all lanes: blocks may be read in any order, by any thread or device, and a moved block still changes
the sums. The last word of a tensor is filled up with zero bytes; lengths, names and shapes enter through the layout's
id. The result is BLAKE2b over both sums and that id, 128 bits, of which a local change passes through about 63.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

LANES = 1 << 14
"""Words side by side: 128 KiB of accumulators stay in a core's second-level cache (half of it measured a
quarter slower, the overhead of each call weighs more)."""

ROWS = 16
"""Steps of a chain: few, so that many blocks run side by side on a device, enough to make the mixing cheap."""

BLOCK_BYTES = LANES * ROWS * 8
"""2 MiB: a tensor that is cut is cut at multiples of this, from its own start."""

_MASK_64 = (1 << 64) - 1


def signed(constant: int) -> int:
    """The int64 with the bits of an unsigned constant."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


# Odd constants with bits spread evenly: the golden ratio's fraction (Weyl sequence of splitmix64) and
# splitmix64's own two finalisers (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
GOLDEN = signed(0x9E3779B97F4A7C15)
MIX_1 = signed(0xBF58476D1CE4E5B9)
MIX_2 = signed(0x94D049BB133111EB)


class Run(NamedTuple):
    """Bytes of one tensor, from a multiple of `BLOCK_BYTES` of its own on.

    Attributes:
        position: Where they belong in the flat buffer, in bytes, a multiple of 8.
        data: uint8, one-dimensional, contiguous, 8-byte aligned; only the last run of a tensor may have another
            length than a multiple of `BLOCK_BYTES`.
    """

    position: int
    data: torch.Tensor


class Runs(tuple[Run, ...]):
    """Runs that come again: their addresses are brought to the device once.

    Attributes:
        table: What `miles_sync.digest_cuda` made of them, or None.
    """

    table: torch.Tensor | None = None


class Digest:
    """Accumulates the digest of a transaction's bytes, run by run, in any order, where the bytes are.

    On a device nothing waits: sums stay there until `hexdigest`. Work is queued on the current stream.
    """

    def __init__(self) -> None:
        """Start with nothing read."""
        self._host = [0, 0]
        self._device: torch.Tensor | None = None
        self._scratch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def update(self, runs: Sequence[Run]) -> None:
        """Read runs, all on one device; `Runs` if they will come again."""
        if not runs:
            return
        if runs[0].data.is_cuda:
            self._read_on_device(runs)
        else:
            for run in runs:
                self._read(run)

    def hexdigest(self, layout_id: str) -> str:
        """32 hex digits over all runs read and the layout that `layout_id` names. Waits for the device."""
        sums = self._host
        if self._device is not None:
            sums = [ours + theirs for ours, theirs in zip(sums, self._device.tolist(), strict=True)]
        content = b"".join((number & _MASK_64).to_bytes(8, "little") for number in sums)
        return hashlib.blake2b(content + layout_id.encode(), digest_size=16).hexdigest()

    def _read_on_device(self, runs: Sequence[Run]) -> None:
        from miles_sync import digest_cuda  # noqa: PLC0415 - triton is there only where torch has a device

        sums = digest_cuda.sums(runs)
        self._device = sums if self._device is None else self._device.add_(sums)

    def _read(self, run: Run) -> None:
        data = run.data if run.data.numel() % 8 == 0 else _padded(run.data)
        words = data.view(torch.int64)
        for first in range(0, words.numel(), LANES * ROWS):
            self._read_block(run.position // 8 + first, words[first : first + LANES * ROWS])

    def _read_block(self, position: int, words: torch.Tensor) -> None:
        if self._scratch is None:
            seed = torch.arange(LANES, dtype=torch.int64).mul_(GOLDEN)
            self._scratch = seed, torch.empty_like(seed), torch.empty_like(seed)
        used = min(words.numel(), LANES)
        seed, acc, shifted = (tensor[:used] for tensor in self._scratch)
        acc.copy_(seed)
        for first in range(0, words.numel(), LANES):
            row = words[first : first + LANES]
            lanes = acc[: row.numel()]
            _spread(lanes.bitwise_xor_(row), GOLDEN, 32, shifted[: row.numel()])
        # The key of a lane's position is seed plus a constant: positions count words.
        acc.bitwise_xor_(torch.add(seed, signed(position * GOLDEN & _MASK_64), out=shifted))
        _spread(acc, MIX_1, 31, shifted)
        _spread(acc, MIX_2, 29, shifted)
        self._host[0] += int(acc.sum().item())
        _spread(acc, MIX_1, 32, shifted)
        self._host[1] += int(acc.sum().item())


def digest_of(flat: torch.Tensor, layout_id: str) -> str:
    """Digest one tensor's bytes (uint8, contiguous) at position 0."""
    digest = Digest()
    digest.update([Run(0, flat)])
    return digest.hexdigest(layout_id)


def warm(device: torch.device) -> None:
    """Have a device's kernel compiled, once: seconds, that no sync should take."""
    if device.type == "cuda":
        Digest().update([Run(0, torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device))])


def _padded(data: torch.Tensor) -> torch.Tensor:
    """A copy of bytes, filled up with zeros to a multiple of 8."""
    out = torch.zeros(-(-data.numel() // 8) * 8, dtype=torch.uint8)
    out[: data.numel()].copy_(data)
    return out


def _spread(acc: torch.Tensor, factor: int, shift: int, scratch: torch.Tensor) -> None:
    """Acc *= factor; acc ^= acc >> shift: in place, all in the cache."""
    acc.mul_(factor)
    torch.bitwise_right_shift(acc, shift, out=scratch)
    acc.bitwise_xor_(scratch)
