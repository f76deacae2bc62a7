"""Transports: one examination for all, then what each alone must stand."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from miles_sync.buckets import cut
from miles_sync.channel import Deadline
from miles_sync.digest import BLOCK_BYTES
from miles_sync.errors import DeadlineError, PeerLostError, TransportError
from miles_sync.manifest import TensorMeta, lay_out
from miles_sync.transports import Inlet, Outlet, Stream
from miles_sync.transports.gloo import GlooInlet, GlooOutlet
from miles_sync.transports.shm import Segment, ShmInlet, ShmOutlet, open_segment, read_probe

METAS = [TensorMeta(f"t{i}", "uint8", (BLOCK_BYTES + 100,)) for i in range(3)]
MANIFEST = lay_out(METAS, 0)
BUCKETS = cut(MANIFEST, BLOCK_BYTES)
TOTAL = MANIFEST.total_bytes


def _silence(seconds: float) -> None:
    time.sleep(seconds)


@contextmanager
def _open(kind: str, receivers: int = 1) -> Iterator[tuple[Outlet, list[Inlet]]]:
    inlets: list[Inlet] = []
    if kind == "shm":
        outlet: Outlet = ShmOutlet(Segment(TOTAL))
        inlets += [ShmInlet(outlet.address) for _ in range(receivers)]
    else:
        outlet = GlooOutlet("127.0.0.1", receivers, BLOCK_BYTES)

        def join(rank: int) -> None:
            inlets.append(GlooInlet(outlet.address, outlet.detail(rank), "127.0.0.1", Deadline(10)))

        threads = [threading.Thread(target=join, args=(rank + 1,)) for rank in range(receivers)]
        for thread in threads:
            thread.start()
        outlet.attach(Deadline(10), _silence)
        for thread in threads:
            thread.join()
    try:
        yield outlet, inlets
    finally:
        for inlet in inlets:
            inlet.close()
        outlet.close()
        if isinstance(outlet, ShmOutlet):
            outlet.segment.close()


def _receive(inlet: Inlet, into: torch.Tensor, stream: Stream) -> None:
    inlet.start(stream)
    for bucket in BUCKETS:
        place = inlet.receive(bucket)
        for part in bucket.parts:
            into[part.offset : part.offset + part.nbytes] = place.bytes_of(part)
        inlet.release(bucket)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("kind", "receivers"), [("shm", 1), ("shm", 2), ("gloo", 1), ("gloo", 2)])
def test_every_byte_arrives_sync_after_sync(kind: str, receivers: int, keep: bool) -> None:
    with _open(kind, receivers) as (outlet, inlets):
        assert outlet.kind == kind and {inlet.address for inlet in inlets} == {outlet.address}
        for seed in range(3):
            sent = torch.randint(0, 256, (TOTAL,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            arrived = [torch.zeros_like(sent) for _ in inlets]
            kept = [torch.zeros_like(sent) if keep else None for _ in inlets]
            streams = [Stream(BUCKETS, into, 10.0, _silence) for into in kept]
            threads = [
                threading.Thread(target=_receive, args=given) for given in zip(inlets, arrived, streams, strict=True)
            ]
            for thread in threads:
                thread.start()
            for bucket in BUCKETS:
                buffer = outlet.buffer(bucket, 10.0, _silence)
                buffer.copy_(sent[bucket.start : bucket.stop])
                outlet.send(bucket, buffer)
                for stream in streams:
                    stream.filled = bucket.stop
            outlet.flush(10.0, _silence)
            for thread in threads:
                thread.join()
            covered = torch.cat([torch.arange(p.offset, p.offset + p.nbytes) for b in BUCKETS for p in b.parts])
            for found, into in zip(arrived, kept, strict=True):
                assert torch.equal(found[covered], sent[covered])
                if into is not None and not inlets[0].lasting:
                    assert torch.equal(into[covered], sent[covered])
    outlet.close()  # closing twice is allowed


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_no_default_process_group(kind: str) -> None:
    with _open(kind):
        assert not dist.is_initialized()


def test_shm_is_private_unguessable_and_in_no_directory() -> None:
    one, other = Segment(64), Segment(64)
    path = one.address.split(" ")[0]
    assert one.address.split(" ")[1] != other.address.split(" ")[1]
    assert os.stat(os.path.dirname(path)).st_mode & 0o077 == 0
    other.close()
    one.close()
    with pytest.raises(TransportError, match="No such file"):
        open_segment(one.address)


def test_shm_lives_on_when_its_maker_is_gone() -> None:
    segment = Segment(64)
    mapped = open_segment(segment.address)
    segment.data.fill_(7)
    segment.close()
    del segment
    assert mapped.eq(7).all()


def test_shm_cannot_be_cut_under_the_reader() -> None:
    segment = Segment(8192)
    with pytest.raises(PermissionError):
        os.truncate(segment.address.split(" ")[0], 4096)
    segment.close()


@pytest.mark.parametrize("fault", ["long", "unsealed", "missing", "elsewhere", "other"])
def test_shm_opens_nothing_but_a_sealed_segment_of_full_length(fault: str, tmp_path: Path) -> None:
    segment = Segment(4096)
    path, name, nbytes = segment.address.split(" ")
    file = os.memfd_create(name)
    os.ftruncate(file, 4096)
    address = {
        "long": f"{path} {name} 4097",
        "unsealed": f"/proc/{os.getpid()}/fd/{file} {name} {nbytes}",
        "missing": f"/proc/{os.getpid()}/fd/999999 {name} {nbytes}",
        "elsewhere": f"/etc/hostname {name} {nbytes}",
        "other": f"{path} miles-sync-{'0' * 32} {nbytes}",
    }[fault]
    try:
        with pytest.raises(TransportError):
            open_segment(address)
    finally:
        os.close(file)
        segment.close()


def test_shm_without_room_says_so() -> None:
    with pytest.raises(TransportError, match="no room"):
        Segment(1 << 50)
    with pytest.raises(TransportError, match="must hold"), _open("shm") as (_, inlets):
        longer = cut(lay_out([TensorMeta("a", "uint8", (TOTAL * 2,))], 0), BLOCK_BYTES)
        inlets[0].start(Stream(longer, None, 1.0, _silence))


def test_probe_reads_what_was_written() -> None:
    segment = Segment(32)
    segment.data.copy_(torch.arange(48, 80, dtype=torch.uint8))
    assert read_probe(segment.address) == bytes(range(48, 80)).decode()
    segment.close()


def test_shm_waits_for_what_is_not_there_yet_until_the_deadline() -> None:
    with _open("shm") as (_, inlets):
        inlets[0].start(Stream(BUCKETS, None, 0.2, _silence))
        with pytest.raises(DeadlineError, match=r"nothing moved within 0\.2 s"):
            inlets[0].receive(BUCKETS[0])


def test_gloo_names_a_receiver_that_stops_reading() -> None:
    with _open("gloo") as (outlet, _):
        for bucket in BUCKETS[:2]:
            outlet.send(bucket, outlet.buffer(bucket, 1.0, _silence))
        with pytest.raises(DeadlineError, match=r"nothing moved within 0\.2 s"):
            for _ in range(200):  # until no socket takes more
                outlet.send(BUCKETS[0], outlet.buffer(BUCKETS[0], 0.2, _silence))


def test_gloo_names_a_peer_that_left() -> None:
    with _open("gloo") as (outlet, inlets):
        inlets[0].close()
        with pytest.raises(PeerLostError):
            for _ in range(3):
                outlet.send(BUCKETS[0], outlet.buffer(BUCKETS[0], 2.0, _silence))
            outlet.flush(2.0, _silence)
    with _open("gloo") as (outlet, inlets):
        outlet.close()
        with pytest.raises(PeerLostError):
            inlets[0].start(Stream(BUCKETS, None, 2.0, _silence))
            inlets[0].receive(BUCKETS[0])


def test_a_wait_ends_where_the_other_side_speaks() -> None:
    def speaks(seconds: float) -> None:
        raise PeerLostError("it gave up", stage="transfer")

    for kind in ("shm", "gloo"):
        with _open(kind) as (_, inlets):
            inlets[0].start(Stream(BUCKETS, None, 10.0, speaks))
            with pytest.raises(PeerLostError, match="gave up"):
                inlets[0].receive(BUCKETS[0])


def test_gloo_names_a_peer_that_never_comes() -> None:
    outlet = GlooOutlet("127.0.0.1", 1, BLOCK_BYTES)
    with pytest.raises(TransportError, match="gloo"):
        outlet.attach(Deadline(0.2), _silence)
    with pytest.raises(TransportError, match="gloo store"):
        GlooInlet("no such address", b"1 2", "127.0.0.1", Deadline(0.2))


def test_gloo_listens_on_loopback_alone() -> None:
    link = GlooOutlet("127.0.0.1", 1, BLOCK_BYTES)
    port = int(link.address.split(" ")[1])
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    with open("/proc/net/tcp6") as table:
        listening += [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert [at for at in listening if at.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    link.close()
