"""Transports: one examination for all, then what each alone must stand."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from miles_sync.channel import Deadline
from miles_sync.errors import CorruptError, DeadlineError, PeerLostError, TransportError
from miles_sync.transports import Arena, Inlet, Link
from miles_sync.transports import shm as shm_module
from miles_sync.transports.gloo import GlooArena, GlooInlet, GlooLink
from miles_sync.transports.shm import DIRECTORY, Segment, ShmArena, ShmInlet, ShmLink, read_probe

BUCKET = 1 << 16
TOTAL = 3 * BUCKET + 192


@contextmanager
def _open(kind: str) -> Iterator[tuple[Arena, Link, Inlet]]:
    inlets: list[Inlet] = []
    if kind == "shm":
        arena: Arena = ShmArena(TOTAL)
        assert isinstance(arena, ShmArena)
        link: Link = ShmLink(arena)
        inlets.append(ShmInlet(link.address, link.nbytes))
    else:
        arena = GlooArena(BUCKET)
        link = GlooLink("127.0.0.1", "peer")
        thread = threading.Thread(target=lambda: inlets.append(GlooInlet(link.address, "127.0.0.1", Deadline(10))))
        thread.start()
        link.attach(Deadline(10))
        thread.join()
    try:
        yield arena, link, inlets[0]
    finally:
        inlets[0].close()
        link.close()
        arena.close()


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_every_byte_arrives_sync_after_sync(kind: str) -> None:
    with _open(kind) as (arena, link, inlet):
        assert (link.kind, link.address) == (kind, inlet.address)
        for seed in range(3):
            sent = torch.randint(0, 256, (TOTAL,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            arrived = torch.zeros_like(sent)
            ready = threading.Semaphore(0)

            def receive(into: torch.Tensor = arrived, ready: threading.Semaphore = ready) -> None:
                for start in range(0, TOTAL, BUCKET):
                    ready.acquire()
                    inlet.receive(start, into[start : start + BUCKET], Deadline(10))

            thread = threading.Thread(target=receive)
            thread.start()
            for start in range(0, TOTAL, BUCKET):
                piece = sent[start : start + BUCKET]
                buffer = arena.buffer(start, start + piece.numel())
                buffer.copy_(piece)
                ready.release()
                link.send(buffer, Deadline(10))
            link.flush(Deadline(10))
            thread.join()
            assert torch.equal(arrived, sent)
    link.close()  # closing twice is allowed


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_no_default_process_group(kind: str) -> None:
    with _open(kind):
        assert not dist.is_initialized()


def test_shm_is_private_and_unguessable() -> None:
    one, other = Segment(64), Segment(64)
    try:
        status = os.stat(os.path.join(DIRECTORY, one.name))
        assert status.st_mode & 0o777 == 0o600
        assert one.name != other.name and len(one.name) >= 32
    finally:
        one.close()
        other.close()
    assert not os.path.exists(os.path.join(DIRECTORY, one.name))


def test_shm_lives_on_unlinked() -> None:
    arena = ShmArena(64)
    inlet = ShmInlet(arena.segment.name, 64)
    arena.segment.unlink()
    arena.buffer(0, 64).fill_(7)
    into = torch.zeros(64, dtype=torch.uint8)
    inlet.receive(0, into, Deadline(1))
    assert into.eq(7).all()
    inlet.close()
    arena.close()


def test_shm_cut_short_under_the_reader_is_an_error_not_a_crash() -> None:
    arena = ShmArena(8192)
    inlet = ShmInlet(arena.segment.name, 8192)
    os.truncate(os.path.join(DIRECTORY, arena.segment.name), 4096)
    with pytest.raises(CorruptError, match="4096 short"):
        inlet.receive(0, torch.zeros(8192, dtype=torch.uint8), Deadline(1))
    inlet.close()
    arena.close()


@pytest.mark.parametrize("fault", ["short", "public", "missing", "elsewhere", "link"])
def test_shm_opens_nothing_but_a_private_segment_of_full_length(fault: str) -> None:
    arena = ShmArena(4096)
    name = arena.segment.name
    path = os.path.join(DIRECTORY, name)
    nbytes = 4096
    link = None
    match fault:
        case "short":
            nbytes = 4097
        case "public":
            os.chmod(path, 0o644)
        case "missing":
            arena.segment.unlink()
        case "elsewhere":
            name = "../../etc/hostname"
        case "link":
            name = "miles-sync-" + "0" * 32
            link = os.path.join(DIRECTORY, name)
            os.symlink(path, link)
    try:
        with pytest.raises(TransportError):
            ShmInlet(name, nbytes)
    finally:
        arena.close()
        if link:
            os.unlink(link)


def test_shm_sweeps_what_a_killed_sender_left_and_nothing_else() -> None:
    left = os.path.join(DIRECTORY, "miles-sync-" + os.urandom(16).hex())
    held = os.path.join(DIRECTORY, "miles-sync-" + os.urandom(16).hex())
    os.close(os.open(left, os.O_CREAT | os.O_RDWR, 0o600))
    file = os.open(held, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        Segment(64).close()
        assert not os.path.exists(left) and os.path.exists(held)
    finally:
        os.close(file)
        os.unlink(held)


def test_shm_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportError, match="no room"):
        Segment(1 << 50)
    monkeypatch.setattr(shm_module, "DIRECTORY", "/nonexistent")
    with pytest.raises(TransportError, match="nonexistent"):
        Segment(64)
    assert shm_module.free_bytes() == 0


def test_probe_reads_what_was_written() -> None:
    segment = Segment(32)
    segment.data.copy_(torch.arange(48, 80, dtype=torch.uint8))
    assert read_probe(segment.name) == bytes(range(48, 80)).decode()
    segment.close()


def test_gloo_names_a_receiver_that_stops_reading() -> None:
    with _open("gloo") as (_, link, _):
        big = torch.zeros(1 << 26, dtype=torch.uint8)
        link.send(big, Deadline(1))
        with pytest.raises(DeadlineError, match=r"nothing moved within 0\.2 s"):
            link.flush(Deadline(0.2))


def test_gloo_names_a_peer_that_left() -> None:
    with _open("gloo") as (arena, link, inlet):
        inlet.close()
        with pytest.raises(PeerLostError):
            link.send(arena.buffer(0, BUCKET), Deadline(2))
            link.flush(Deadline(2))
    with _open("gloo") as (_, link, inlet):
        link.close()
        with pytest.raises(PeerLostError):
            inlet.receive(0, torch.zeros(8, dtype=torch.uint8), Deadline(2))


def test_gloo_names_a_peer_that_never_comes() -> None:
    link = GlooLink("127.0.0.1", "peer")
    with pytest.raises(TransportError, match="gloo"):
        link.attach(Deadline(0.2))
    with pytest.raises(TransportError, match="gloo store"):
        GlooInlet("no such address", "127.0.0.1", Deadline(0.2))


def test_gloo_listens_on_loopback_alone() -> None:
    link = GlooLink("127.0.0.1", "peer")
    port = int(link.address.split(" ")[1])
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    with open("/proc/net/tcp6") as table:
        listening += [line.split()[1] for line in table if line.split()[3] == "0A"]
    assert [at for at in listening if at.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    link.close()
