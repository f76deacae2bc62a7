"""gloo: buckets travel over TCP along a chain, from the sender to the first receiver, from there to the next.

The chain is a `ProcessGroupGloo` made for this sender and its receivers alone, over a store that the sender serves on
the address under which the first receiver reached it; the default process group is neither needed nor touched. Store
keys carry an unguessable prefix that travels on the control channel. gloo itself neither authenticates nor encrypts:
off loopback, use it on a network you trust.
"""

from __future__ import annotations

import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import (
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage] - documented there, not marked so
)
from torch.distributed.distributed_c10d import PrefixStore, Store

from miles_sync.buckets import Bucket, within
from miles_sync.channel import Deadline, listen
from miles_sync.errors import PeerLostError, SyncError, TransportError
from miles_sync.transports import Hear, Place, Stream, wait_until

_BUFFERS = 2


class _Chain:
    """One rank's links to the ranks before and behind it.

    gloo's own wait cannot be polled, and ends the connection when it times out: threads wait, whoever needs the
    result listens meanwhile.
    """

    def __init__(self, store: Store, prefix: str, rank: int, size: int, host: str, deadline: Deadline) -> None:
        """Meet the others. Raises `TransportError`."""
        self._rank, self._last = rank, rank == size - 1
        gloo: Any = ProcessGroupGloo  # its stub lacks options, send and recv
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=max(deadline.left(), 0.001))
        try:
            self._group: Any = gloo(PrefixStore(prefix, store), rank, size, options)
        except RuntimeError as error:
            raise TransportError(f"gloo: {error}", stage="transfer") from error
        self._threads = ThreadPoolExecutor(2 * _BUFFERS, thread_name_prefix="miles-sync-gloo")

    def send(self, buffer: torch.Tensor, patience_s: float) -> Future[None] | None:
        """Send to the next rank; None where this is the last."""
        return None if self._last else self._begin(self._group.send, buffer, self._rank + 1, patience_s)

    def receive(self, buffer: torch.Tensor, patience_s: float) -> Future[None]:
        """Receive from the rank before."""
        return self._begin(self._group.recv, buffer, self._rank - 1, patience_s)

    def close(self) -> None:
        """Drop the links; what is pending fails at once on both sides."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()
            self._threads.shutdown(wait=False)

    def _begin(self, act: Any, buffer: torch.Tensor, rank: int, patience_s: float) -> Future[None]:
        if self._group is None:
            raise TransportError("gloo: closed", stage="transfer")
        try:
            work = act([buffer], rank, 0)
        except RuntimeError as error:
            raise _named(error) from error
        return self._threads.submit(work.wait, timedelta(seconds=patience_s))


def _finish(future: Future[None], patience_s: float, hear: Hear) -> None:
    wait_until(future.done, patience_s, hear, "gloo")
    error = future.exception()
    if error is not None:
        raise _named(error) from error


def _named(error: BaseException) -> SyncError:
    return PeerLostError(f"gloo: {str(error).splitlines()[0]}", stage="transfer")


class GlooOutlet:
    """The sender's end: serves the store, then sends out of two buffers in turn."""

    kind = "gloo"
    says = False

    def __init__(self, host: str, receivers: int, bucket_bytes: int) -> None:
        """Serve a store on `host`, an address of this machine that the receivers can reach."""
        self._host = host
        self._size = receivers + 1
        self._chain: _Chain | None = None
        self._in_flight: list[Future[None] | None] = [None] * _BUFFERS
        self._buffers = [torch.zeros(bucket_bytes, dtype=torch.uint8) for _ in range(_BUFFERS)]
        self._patience_s = 0.0
        listener = listen(host)
        port = listener.getsockname()[1]
        # Left to itself the store listens on every interface; given a socket it uses that one, and owns it.
        self._store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        self._prefix = secrets.token_hex(16)
        self.address = f"{host} {port} {self._prefix}"

    def detail(self, rank: int) -> bytes:
        """Its rank and the chain's length."""
        return f"{rank} {self._size}".encode()

    def attach(self, deadline: Deadline, hear: Hear) -> None:
        """Build the chain; the receivers build their parts at the same time."""
        self._chain = _Chain(self._store, self._prefix, 0, self._size, self._host, deadline)

    def buffer(self, bucket: Bucket, patience_s: float, hear: Hear) -> torch.Tensor:
        """One of the two, once the bucket that was in it has left."""
        self._patience_s = patience_s
        self._wait(bucket.index % _BUFFERS, patience_s, hear)
        return self._buffers[bucket.index % _BUFFERS][: bucket.nbytes]

    def send(self, bucket: Bucket, buffer: torch.Tensor) -> None:
        """Start sending to the first receiver."""
        if self._chain is None:
            raise TransportError("gloo: not attached", stage="transfer")
        self._in_flight[bucket.index % _BUFFERS] = self._chain.send(buffer, self._patience_s)

    def flush(self, patience_s: float, hear: Hear) -> None:
        """Wait for both."""
        for slot in range(_BUFFERS):
            self._wait(slot, patience_s, hear)

    def close(self) -> None:
        """Drop the chain; pending calls of the receivers fail at once."""
        self._in_flight = [None] * _BUFFERS
        chain, self._chain = self._chain, None
        if chain is not None:
            chain.close()

    def _wait(self, slot: int, patience_s: float, hear: Hear) -> None:
        future, self._in_flight[slot] = self._in_flight[slot], None
        if future is not None:
            _finish(future, patience_s, hear)


class GlooInlet:
    """A receiver's end: receives into the flat buffer, or into two buffers in turn, always one bucket ahead."""

    lasting = False
    device = torch.device("cpu")

    def __init__(self, address: str, detail: bytes, local_host: str, deadline: Deadline) -> None:
        """Join the sender's chain, talking from `local_host`. Raises `TransportError`."""
        self.address = address
        self._buffers: list[torch.Tensor] = []
        self._pending: dict[int, tuple[Future[None], torch.Tensor]] = {}
        self._forwarding: dict[int, Future[None]] = {}
        try:
            host, port, prefix = address.split(" ")
            rank, size = map(int, detail.split(b" "))
            timeout = timedelta(seconds=max(deadline.left(), 0.001))
            store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
        except (ValueError, RuntimeError) as error:
            raise TransportError(f"gloo store {address!r}: {error}", stage="transfer") from error
        self._chain = _Chain(store, prefix, rank, size, local_host, deadline)

    def start(self, stream: Stream) -> None:
        """Post the first receives."""
        self._stream = stream
        self._pending.clear()
        self._forwarding.clear()
        longest = max((bucket.nbytes for bucket in stream.buckets), default=0)
        if stream.into is None and (not self._buffers or self._buffers[0].numel() < longest):
            self._buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(_BUFFERS)]
        for bucket in stream.buckets[:_BUFFERS]:
            self._post(bucket)

    def receive(self, bucket: Bucket) -> Place:
        """Wait for the bucket, and pass it on. Both sides take its length from the same manifest.

        A message longer than the buffer would end this process (gloo's reading thread throws, and nothing catches
        it): a chain that saw an error is never used again.
        """
        future, buffer = self._pending.pop(bucket.index)
        _finish(future, self._stream.patience_s, self._stream.hear)
        forwarding = self._chain.send(buffer, self._stream.patience_s)
        if forwarding is not None:
            self._forwarding[bucket.index] = forwarding
        return Place(buffer.data_ptr(), within(buffer, bucket))

    def release(self, bucket: Bucket) -> None:
        """Post the receive that takes its buffer next, once it was passed on; after the last, see that all were."""
        last = bucket.index == len(self._stream.buckets) - 1
        for index in sorted(self._forwarding) if last else [bucket.index]:
            forwarding = self._forwarding.pop(index, None)
            if forwarding is not None:
                _finish(forwarding, self._stream.patience_s, self._stream.hear)
        if bucket.index + _BUFFERS < len(self._stream.buckets):
            self._post(self._stream.buckets[bucket.index + _BUFFERS])

    def close(self) -> None:
        """Drop the chain; pending calls of its neighbours fail at once."""
        self._pending.clear()
        self._forwarding.clear()
        self._chain.close()

    def _post(self, bucket: Bucket) -> None:
        into = self._stream.into
        if into is not None:
            buffer = into[bucket.start : bucket.stop]
        else:
            buffer = self._buffers[bucket.index % _BUFFERS][: bucket.nbytes]
        self._pending[bucket.index] = self._chain.receive(buffer, self._stream.patience_s), buffer
