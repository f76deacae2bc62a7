"""Receivers: whose weights a transaction changes.

A receiver knows its weights and nothing of transports or messages. It is handed pieces of tensors and writes
them where they belong:

    check(manifest)     is every weight covered? changes nothing; asked for once per layout
    begin(manifest, mode)  ▸  install(pieces) *  ▸  commit(version)
                           ╲_______________________  abandon()      the weights may be a mixture

In staged mode the three come together, once everything has arrived and was verified. In place, `begin` comes before
the first bucket, `install` with every bucket as it arrives, `commit` after the digests were found equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch

from miles_sync.buckets import cut, pack
from miles_sync.digest import CHUNK_BYTES, Digest
from miles_sync.errors import MismatchError
from miles_sync.manifest import Manifest, describe, lay_out
from miles_sync.sources import named_weights

Mode = Literal["staged", "in_place"]


class Piece(NamedTuple):
    """A tensor of the manifest, or a run of its elements.

    Attributes:
        index: Which entry of the manifest.
        start: First element, in the entry's row-major order; 0 for a whole entry.
        data: The entry's dtype. A whole entry has the entry's shape, a run is one-dimensional. A view of memory
            that is reused once the call has returned (on a device: once the current stream has passed it).
    """

    index: int
    start: int
    data: torch.Tensor


class Receiver(Protocol):
    """Weights that can be checked against, written and fingerprinted.

    All calls come one at a time. `check` may come from another thread than the rest; on a device, `install` runs under
    the stream that the pieces arrive on, and whoever called it synchronises before answering anybody.

    Attributes:
        device: Where pieces are wanted; they may come from host memory where the transport has no other.
        exact: Whether live weights are the manifest's tensors: `fingerprint` then gives the transaction's digest.
    """

    device: torch.device
    exact: bool

    def check(self, manifest: Manifest) -> None:
        """Raise `MismatchError` unless installing these tensors would write every weight and nothing else."""
        ...

    def begin(self, manifest: Manifest, mode: Mode) -> None:
        """Get ready for the pieces of a manifest that was checked. Writes no weight yet."""
        ...

    def install(self, pieces: Sequence[Piece]) -> None:
        """Write pieces into the live weights, in any order of entries.

        The runs of an entry start at multiples of 2 MiB and together cover it. For one layout and transport the very
        same sequence object (same views, same addresses) comes again in each sync: what was worked out for it may be
        kept, by `id(pieces)`, until the next `begin` with another layout.
        """
        ...

    def commit(self, version: int) -> None:
        """All pieces were installed and verified: do what remains, and serve."""
        ...

    def abandon(self) -> None:
        """The transaction ended between `begin` and `commit`: weights may be a mixture, until another is committed."""
        ...

    def fingerprint(self) -> Callable[[], str]:
        """Start digesting the live weights as they are now; the call that is returned waits for 32 hex digits."""
        ...


class ModuleReceiver:
    """Receives into a `torch.nn.Module`: parameters and persistent buffers, by name, shape and dtype.

    Attributes:
        lock: Held while weights are written or read. A thread that runs the module while another serves
            this receiver takes it around each forward pass.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        """Receive into `module`, in place: its tensors keep their addresses."""
        self._module = module
        self.lock = threading.Lock()

    def check(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Raise `MismatchError` naming what is missing, unknown, or of another shape or dtype."""
        live = named_weights(self._module)
        missing, unknown = live.keys() - staged.keys(), staged.keys() - live.keys()
        wrong = [
            f"{name} is {_kind(staged[name])}, the module's is {_kind(live[name])}"
            for name in live.keys() & staged.keys()
            if _kind(staged[name]) != _kind(live[name])
        ]
        faults = [
            f"{what}: {listed(names)}"
            for what, names in (("missing", missing), ("unknown", unknown), ("different", wrong))
            if names
        ]
        if faults:
            raise MismatchError("; ".join(faults), stage="begin")

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Copy each tensor into the module's."""
        with self.lock, torch.no_grad():
            for name, tensor in named_weights(self._module).items():
                tensor.copy_(staged[name])

    def fingerprint(self) -> str:
        """Digest of the module's weights."""
        with self.lock:
            return fingerprint(named_weights(self._module))


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """Digest named tensors where they lie: 32 hex digits over names, dtypes, shapes and every byte.

    Reads through 8 MiB of host memory. Equal to a transaction's digest where names, order and dtypes are equal.
    """
    manifest = lay_out((describe(name, tensor) for name, tensor in weights.items()), version=0)
    buckets = cut(manifest.total_bytes, CHUNK_BYTES)
    buffer = torch.empty(buckets[0].nbytes, dtype=torch.uint8)
    digest = Digest()
    for bucket, packed in pack(manifest, weights.items(), buckets, lambda b: buffer[: b.nbytes]):
        digest.update(bucket.start, packed)
    return digest.hexdigest(manifest.layout_id())


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Name a few of many."""
    names = sorted(items)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
