"""Receivers: whose weights a transaction changes.

A receiver knows its weights and nothing of transports or messages. It is told to check, then to load.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from miles_sync.buckets import cut, pack
from miles_sync.digest import CHUNK_BYTES, Digest
from miles_sync.errors import MismatchError
from miles_sync.manifest import describe, lay_out
from miles_sync.sources import named_weights


class Receiver(Protocol):
    """Weights that can be checked against, loaded and fingerprinted."""

    def check(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Raise `MismatchError` unless `load` of such tensors would write every weight and nothing else.

        Changes nothing. Names, shapes and dtypes are those of the transfer to come; the contents may be anything.
        """
        ...

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Write the staged tensors into the live weights. The staging memory is reused afterwards."""
        ...

    def fingerprint(self) -> str:
        """A digest of the live weights as they lie in memory now."""
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
