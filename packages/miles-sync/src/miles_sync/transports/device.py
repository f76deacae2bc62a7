"""What transports on a device share: buckets arriving in two buffers in turn, everything queued, little waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from miles_sync.buckets import Bucket, within
from miles_sync.transports import Hear, Place, Stream, wait_until

BUFFERS = 2
AHEAD = 8
"""Buckets that may be queued and not done: enough to keep the device busy, few enough that no launch queue fills up
(a full one blocks the launching thread, and no deadline can end that)."""


class Window:
    """Keeps whoever queues work from running more than `AHEAD` buckets ahead of the device."""

    def __init__(self, what: str) -> None:
        """Nothing is queued."""
        self._what = what
        self._events: deque[torch.cuda.Event] = deque()

    def add(self, event: torch.cuda.Event, patience_s: float, hear: Hear) -> None:
        """A bucket was queued, and is done once `event` is."""
        self._events.append(event)
        while len(self._events) > AHEAD:
            self._wait_oldest(patience_s, hear)

    def drain(self, patience_s: float, hear: Hear) -> None:
        """Wait until all is done; nothing may stand still for longer than `patience_s`."""
        while self._events:
            self._wait_oldest(patience_s, hear)

    def clear(self) -> None:
        """Forget what was queued."""
        self._events.clear()

    def _wait_oldest(self, patience_s: float, hear: Hear) -> None:
        wait_until(self._events[0].query, patience_s, hear, self._what)
        self._events.popleft()


class Ring:
    """A receiver's buffers: filled on a stream of their own, read on the current one, and given back.

    Args:
        device: Where.
        what: For errors.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        """Hold nothing yet."""
        self.device = device
        # High priority: the blocks of a copy kernel go before those of the digest that overlaps with it.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._what = what
        self._window = Window(what)
        self._buffers: list[torch.Tensor] = []
        self._arrived: dict[int, torch.cuda.Event] = {}

    def start(self, stream: Stream, fill: Callable[[Bucket, torch.Tensor], None]) -> None:
        """Start filling: `fill` queues on `self.stream` what brings a bucket into a buffer."""
        self._of, self._fill = stream, fill
        self._window.clear()
        self._arrived.clear()
        longest = max((bucket.nbytes for bucket in stream.buckets), default=0)
        if stream.into is None and (not self._buffers or self._buffers[0].numel() < longest):
            self._buffers = []  # first: never four at a time
            self._buffers = [torch.empty(longest, dtype=torch.uint8, device=self.device) for _ in range(BUFFERS)]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        for bucket in stream.buckets[:BUFFERS]:
            self._post(bucket)

    def receive(self, bucket: Bucket) -> Place:
        """The bucket, for what is queued on the current stream from now on."""
        arrived = self._arrived.pop(bucket.index)
        torch.cuda.current_stream(self.device).wait_event(arrived)
        self._window.add(arrived, self._of.patience_s, self._of.hear)
        buffer = self._buffer(bucket)
        return Place(buffer.data_ptr(), within(buffer, bucket))

    def release(self, bucket: Bucket) -> None:
        """Fill its buffer anew, once what was queued on the current stream has passed."""
        following = bucket.index + BUFFERS
        if following < len(self._of.buckets):
            if self._of.into is None:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self._post(self._of.buckets[following])

    def _post(self, bucket: Bucket) -> None:
        self._fill(bucket, self._buffer(bucket))
        event = torch.cuda.Event()
        event.record(self.stream)
        self._arrived[bucket.index] = event

    def _buffer(self, bucket: Bucket) -> torch.Tensor:
        into = self._of.into
        if into is not None:
            return into[bucket.start : bucket.stop]
        return self._buffers[bucket.index % BUFFERS][: bucket.nbytes]
