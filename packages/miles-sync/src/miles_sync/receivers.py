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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

from miles_sync.buckets import Piece, Pieces, as_bytes, copy_all
from miles_sync.digest import Digest, Run
from miles_sync.errors import DirtyError, MismatchError
from miles_sync.manifest import Manifest, TensorMeta, describe, lay_out
from miles_sync.messages import Mode
from miles_sync.sources import named_weights

__all__ = ["Mode", "ModuleReceiver", "Piece", "Pieces", "Receiver", "fingerprint", "listed"]


class Receiver(Protocol):
    """Weights that can be checked against, written and fingerprinted.

    All calls come one at a time. `check` may come from another thread than the rest; on a device, `install` runs under
    the stream that the pieces arrive on, and whoever called it synchronises before answering anybody.

    Attributes:
        device: Where pieces are wanted; they come from host memory where the transport has no other.
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

    def install(self, pieces: Pieces) -> None:
        """Write pieces into the live weights, in any order of entries.

        The runs of an entry start at multiples of 2 MiB and together cover it. For one layout and transport the very
        same object (same views, same addresses) comes again in each sync: what was worked out for it may be
        kept in `pieces.memo`.
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
        device: Of the module's weights.
        exact: True: the module's weights are the manifest's tensors.
    """

    exact = True

    def __init__(self, module: torch.nn.Module) -> None:
        """Receive into `module`, in place: its tensors keep their addresses."""
        self._module = module
        self._lock = threading.Lock()
        self._whole = True
        self._live: list[torch.Tensor] = []
        self._order: list[str] = []
        self.device = next(iter(named_weights(module).values()), torch.empty(0)).device

    @contextmanager
    def serving(self) -> Iterator[torch.nn.Module]:
        """The module, whose weights do not change meanwhile: for a thread that runs it while another serves this.

        Raises `DirtyError` while the weights are a mixture of two versions.
        """
        with self._lock:
            if not self._whole:
                reason = "the weights are a mixture of two versions: push this version again, or a newer one"
                raise DirtyError(reason, stage="status")
            yield self._module

    def check(self, manifest: Manifest) -> None:
        """Raise `MismatchError` naming what is missing, unknown, or of another shape or dtype."""
        live = {name: describe(name, tensor) for name, tensor in named_weights(self._module).items()}
        offered = {entry.name: TensorMeta(entry.name, entry.dtype, entry.shape) for entry in manifest.entries}
        wrong = [
            f"{name} is {_kind(offered[name])}, the module's is {_kind(live[name])}"
            for name in live.keys() & offered.keys()
            if offered[name] != live[name]
        ]
        faults = [
            f"{what}: {listed(names)}"
            for what, names in (
                ("missing", live.keys() - offered.keys()),
                ("unknown", offered.keys() - live.keys()),
                ("different", wrong),
            )
            if names
        ]
        if faults:
            raise MismatchError("; ".join(faults), stage="begin")

    def begin(self, manifest: Manifest, mode: Mode) -> None:
        """Find the tensors to write."""
        weights = named_weights(self._module)
        order = [entry.name for entry in manifest.entries]
        live = [weights[name] for name in order]
        if order != self._order or [t.data_ptr() for t in live] != [t.data_ptr() for t in self._live]:
            self._order, self._live = order, live  # the list is a new one: memos of the old are not used any more

    def install(self, pieces: Pieces) -> None:
        """Copy each piece into the module's tensor."""
        with self._lock, torch.no_grad():
            self._whole = False
            if pieces.memo is None or pieces.memo[0] is not self._live:
                pieces.memo = self._live, [self._target(piece) for piece in pieces], [piece.data for piece in pieces]
            copy_all(*pieces.memo[1:])

    def commit(self, version: int) -> None:
        """Serve them."""
        with self._lock:
            self._whole = True

    def abandon(self) -> None:
        """Stay as it is: `serving` refuses if anything was written."""

    def fingerprint(self) -> Callable[[], str]:
        """Digest of the module's weights, in the order of the last transaction."""
        weights = named_weights(self._module)
        with self._lock:
            return fingerprint({name: weights[name] for name in self._order or weights})

    def _target(self, piece: Piece) -> torch.Tensor:
        live = self._live[piece.index]
        if live.shape == piece.data.shape and not piece.start:
            return live
        return live.view(-1)[piece.start : piece.start + piece.data.numel()]


def fingerprint(weights: Mapping[str, torch.Tensor]) -> Callable[[], str]:
    """Start digesting named tensors where they lie, on any device.

    The call that is returned gives 32 hex digits over names, dtypes, shapes and every byte: equal to a transaction's
    digest where names, order and dtypes are equal.
    """
    manifest = lay_out((describe(name, tensor) for name, tensor in weights.items()), version=0)
    digest = Digest()
    placed = [(entry.offset, tensor) for entry, tensor in zip(manifest.entries, weights.values(), strict=True)]
    on_device = [Run(offset, as_bytes(tensor)) for offset, tensor in placed if tensor.is_cuda and tensor.numel()]
    digest.update(on_device)
    for offset, tensor in placed:
        if not tensor.is_cuda:
            digest.update([Run(offset, as_bytes(tensor))])  # one by one: a copy of a strided one goes before the next
    layout = manifest.layout_id()
    return lambda: digest.hexdigest(layout)


def listed(items: Iterable[str], limit: int = 5) -> str:
    """Name a few of many."""
    names = sorted(items)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _kind(meta: TensorMeta) -> str:
    return f"{meta.dtype}{list(meta.shape)}"
