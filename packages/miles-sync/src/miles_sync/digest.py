"""A digest over every byte and its position, in torch integer operations.

Why not a cryptographic hash: on one core SHA-256 and BLAKE2 read 1 to 2 GB/s and neither runs on a device. This
digest is for corruption and programming errors, not for adversaries (the token keeps those out); it has 128
bits, of which any local change passes through at least 64.

The flat buffer is read as little-endian int64 words, in chunks of `ROWS` rows of `LANES` words. Within a chunk
each lane is a chain, in int64 arithmetic modulo 2^64:

    acc[j] = seed[j];   per row r:   acc[j] = (acc[j] ^ word[r, j]) * M;   acc[j] ^= acc[j] >> 32

M is odd, so one changed word always changes its lane before the shift. The shift brings high bits down: without
it two flipped sign bits cancel in any sum or product modulo 2^64. Then each lane is mixed with its global
position (chunk and lane) and all are summed, so chunks may be read in any order, by any thread or device, and a
moved chunk still changes the sum. Trailing zero bytes are told apart by the length, names and shapes by the
manifest's layout id: both enter the final hash, BLAKE2b over 48 bytes.
"""

from __future__ import annotations

import hashlib

import torch

LANES = 1 << 14
"""Words side by side: 128 KiB of accumulators stay in a core's second-level cache (half of it measured a
quarter slower, the overhead of each call weighs more)."""

ROWS = 64
"""Steps of a chain, so that many chunks can run side by side where there are many cores."""

CHUNK_BYTES = LANES * ROWS * 8
"""8 MiB: pieces handed to `Digest.update` start on such a boundary."""


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


# Odd constants with bits spread evenly: the golden ratio's fraction (Weyl sequence of splitmix64) and
# splitmix64's own two finalisers (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1


class Digest:
    """Accumulates the digest of a flat buffer, piece by piece, in any order.

    Args:
        device: Where the pieces are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start with nothing read."""
        self._seed = torch.arange(LANES, dtype=torch.int64, device=device).mul_(_GOLDEN)
        self._shifted = torch.empty_like(self._seed)
        self._sums = [0, 0]
        self._nbytes = 0

    def update(self, start: int, piece: torch.Tensor) -> None:
        """Read one piece.

        Args:
            start: Byte offset of the piece in the flat buffer, a multiple of `CHUNK_BYTES`.
            piece: uint8, one-dimensional, contiguous, 8-byte aligned, a multiple of 8 long; only the
                last piece of a buffer may be other than a multiple of `CHUNK_BYTES` long.
        """
        if start % CHUNK_BYTES or piece.numel() % 8:
            raise ValueError(f"start={start} must be a multiple of {CHUNK_BYTES}, length {piece.numel()} of 8")
        words = piece.view(torch.int64)
        per_chunk = LANES * ROWS
        for first in range(0, words.numel(), per_chunk):
            chunk = (start // 8 + first) // per_chunk
            self._read_chunk(chunk, words[first : first + per_chunk])
        self._nbytes += piece.numel()

    def hexdigest(self, layout_id: str) -> str:
        """32 hex digits over all pieces read, their length and the layout that `layout_id` names."""
        numbers = (*self._sums, self._nbytes)
        content = b"".join(number.to_bytes(8, "little") for number in numbers)
        return hashlib.blake2b(content + layout_id.encode(), digest_size=16).hexdigest()

    def _read_chunk(self, chunk: int, words: torch.Tensor) -> None:
        acc = self._seed.clone()
        for first in range(0, words.numel(), LANES):
            row = words[first : first + LANES]
            lanes, shifted = acc[: row.numel()], self._shifted[: row.numel()]
            lanes.bitwise_xor_(row).mul_(_GOLDEN)
            torch.bitwise_right_shift(lanes, 32, out=shifted)
            lanes.bitwise_xor_(shifted)
        position = torch.arange(chunk * LANES, (chunk + 1) * LANES, device=acc.device)
        for index, salt in enumerate((_MIX_1, _MIX_2)):
            total = int(_mix(acc ^ _mix(position * _GOLDEN + salt)).sum().item())
            self._sums[index] = (self._sums[index] + total) & _MASK_64


def digest_of(flat: torch.Tensor, layout_id: str) -> str:
    """Digest a whole flat buffer (uint8, contiguous, a multiple of 8 long)."""
    digest = Digest(flat.device)
    digest.update(0, flat)
    return digest.hexdigest(layout_id)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser; masks turn the arithmetic shift of int64 into a logical one."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
