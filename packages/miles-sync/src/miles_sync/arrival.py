"""What a receiver does with the buckets of one transaction: digest each, then keep it or install it.

On a device all of it is queued on one stream, next to the one that buckets arrive on: while one bucket arrives, the one
before is digested and installed, and the thread waits only at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch

from miles_sync import transports
from miles_sync.buckets import Bucket, Pieces, cut, pieces, runs
from miles_sync.digest import Digest, Runs
from miles_sync.errors import ProtocolError
from miles_sync.manifest import Manifest
from miles_sync.messages import Mode
from miles_sync.receivers import Receiver
from miles_sync.transports import Hear, Inlet
from miles_sync.transports.device import Window


class Arrival:
    """The buckets of one layout, transaction after transaction.

    Attributes:
        layout: Id of the layout that is expected, "" where none is.
        mode: Of the transaction.
    """

    def __init__(self, receiver: Receiver) -> None:
        """Expect nothing yet."""
        self._receiver = receiver
        self._manifest: Manifest | None = None
        self.layout = ""
        self.mode: Mode = "staged"
        self._buckets: tuple[Bucket, ...] = ()
        self._cut_at = 0
        self._flat: torch.Tensor | None = None
        self._places: dict[tuple[int, Hashable], tuple[Runs, Pieces]] = {}
        self._kept: list[Pieces] = []
        self._stream: transports.Stream | None = None
        self._digest: Digest | None = None
        self._result: str | None = None
        self._queue = torch.cuda.Stream(receiver.device) if receiver.device.type == "cuda" else None

    @property
    def manifest(self) -> Manifest:
        """The layout's."""
        if self._manifest is None:
            raise ProtocolError("no manifest was sent", stage="begin")
        return self._manifest

    def expect(self, manifest: Manifest, layout: str) -> None:
        """Take up a new layout; memory of the one before goes."""
        if layout != self.layout:
            self._flat = None
            self._cut_at = 0
            self.forget_places()
        self._manifest, self.layout = manifest, layout

    def begin(self, version: int, mode: Mode, bucket_bytes: int, digest: bool) -> None:
        """Get ready for a transaction."""
        self._manifest = self.manifest.with_version(version)
        if bucket_bytes != self._cut_at:
            self._buckets = cut(self.manifest, bucket_bytes)
            self._cut_at = bucket_bytes
            self.forget_places()
        if mode == "in_place":
            self._flat = None
        self.mode = mode
        self._digest = Digest() if digest else None
        self._result = None
        self._kept = []

    def make_room(self, inlet: Inlet) -> bool:
        """Allocate what bytes that come by this transport are kept in. Returns whether they are."""
        keep = self.mode == "staged" and not inlet.lasting
        if keep:
            self._allocate(inlet.device)
        return keep

    def filled(self, nbytes: int) -> None:
        """The sender says how far the shared memory is filled."""
        if self._stream is not None:
            self._stream.filled = nbytes

    def receive(self, inlet: Inlet, patience_s: float, hear: Hear, soil: Callable[[], None]) -> None:
        """Take in all buckets. `soil` is called before the first weight is written."""
        keep = self.make_room(inlet)
        self._stream = transports.Stream(self._buckets, self._flat if keep else None, patience_s, hear)
        with self._on_queue():
            window = Window("installing")
            if self.mode == "in_place" and self._queue is not None:
                torch.cuda.synchronize(self._queue.device)  # whoever read the weights is done
            inlet.start(self._stream)
            for bucket in self._buckets:
                self._take(inlet, bucket, soil)
                if self._queue is not None:
                    event = torch.cuda.Event()
                    event.record(self._queue)
                    window.add(event, patience_s, hear)
            window.drain(patience_s, hear)
        self._stream = None

    def _take(self, inlet: Inlet, bucket: Bucket, soil: Callable[[], None]) -> None:
        key, bytes_of = inlet.receive(bucket)
        known = self._places.get((bucket.index, key))
        if known is None:
            known = runs(bucket.parts, bytes_of), pieces(self.manifest, bucket.parts, bytes_of)
            self._places[bucket.index, key] = known
        if self._digest is not None:
            self._digest.update(known[0])
        if self.mode == "in_place":
            soil()
            self._receiver.install(known[1])
        else:
            self._kept.append(known[1])
        inlet.release(bucket)

    def digest(self) -> str:
        """Of what has arrived; "" where none was asked for."""
        if self._result is None:
            with self._on_queue():
                self._result = "" if self._digest is None else self._digest.hexdigest(self.layout)
        return self._result

    def install(self) -> None:
        """Write what was kept."""
        for kept in self._kept:
            self._receiver.install(kept)
        if self._queue is not None:
            torch.cuda.current_stream(self._queue.device).synchronize()

    def forget_places(self) -> None:
        """The transport's memory goes: views of it must too."""
        self._places.clear()
        self._kept = []

    def _allocate(self, device: torch.device) -> None:
        total = self.manifest.total_bytes
        if self._flat is None or self._flat.device != device or self._flat.numel() != total:
            self._flat = None  # first: never two at a time
            self._flat = torch.empty(total, dtype=torch.uint8, device=device)
            self.forget_places()

    def _on_queue(self) -> contextlib.AbstractContextManager[Any]:
        if self._queue is None:
            return contextlib.nullcontext()
        stack = contextlib.ExitStack()
        stack.enter_context(torch.cuda.device(self._queue.device))
        stack.enter_context(torch.cuda.stream(self._queue))
        return stack
