"""Processes that die or freeze, in each stage: a named error within the deadline, the old weights, a clean retry."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch

from miles_sync import (
    CorruptError,
    DeadlineError,
    DriftError,
    MismatchError,
    ModuleReceiver,
    PeerLostError,
    ReceiverTarget,
    SyncError,
    TensorMeta,
    WeightSync,
    serve,
)
from miles_sync.arrival import Arrival
from miles_sync.buckets import Bucket
from miles_sync.digest import BLOCK_BYTES
from miles_sync.receivers import Receiver
from miles_sync.sources import as_source
from miles_sync.staging import Staging
from miles_sync.transaction import Transaction
from miles_sync.transports.gloo import GlooOutlet

TOKEN = "the token of these tests"
DEADLINE_S = 3.0
CASES = [
    ("begin", "shm", "in_place"),
    ("begin", "gloo", "staged"),
    ("transfer", "shm", "staged"),
    ("transfer", "shm", "in_place"),
    ("transfer", "gloo", "staged"),
    ("transfer", "gloo", "in_place"),
    ("verify", "shm", "in_place"),
    ("verify", "gloo", "staged"),
    ("commit", "shm", "staged"),
    ("commit", "gloo", "in_place"),
]

# A server forked once with torch loaded: children start in milliseconds and inherit no thread of the tests.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["miles_sync", "miles_sync.transaction"])


def _weights(value: float) -> dict[str, torch.Tensor]:
    """The second does not fit into the bucket of the first."""
    return {"a": torch.full((BLOCK_BYTES // 4,), value), "b": torch.full((7,), value)}


def _module(value: float) -> torch.nn.Module:
    return torch.nn.ParameterDict(_weights(value))


def _values(module: torch.nn.Module) -> set[float]:
    return {element for tensor in module.parameters() for element in tensor.unique().tolist()}


# -- the sender ----------------------------------------------------------------------------------------


def _send_and_die(
    port: int, kind: str, stage: str, how: int, mode: str = "staged", written: Event | None = None
) -> None:
    """Push version 1 and stop in the middle of a stage; in the transfer once the first bucket was `written`."""

    class Source:
        def metadata(self) -> Sequence[TensorMeta]:
            return as_source(_weights(2.0)).metadata()

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in _weights(2.0).items():
                if name == "b" and stage == "transfer":
                    assert written is None or written.wait(30)
                    os.kill(os.getpid(), how)
                yield name, tensor

    torch.set_num_threads(1)
    if stage != "transfer":
        # Before the last call of the stage is answered: the receiver is told, the sender gone.
        name = {"begin": "_offer", "verify": "_verify", "commit": "_commit_one"}[stage]
        step = getattr(Transaction, name)

        def die(self: Transaction, *args: object) -> None:
            if stage == "begin":
                step(self, *args)
            os.kill(os.getpid(), how)

        setattr(Transaction, name, die)
    target = ReceiverTarget("127.0.0.1", port)
    sync = WeightSync(
        [target],
        token=TOKEN,
        transport=kind,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        deadline_s=DEADLINE_S,
        bucket_bytes=BLOCK_BYTES,
    )
    sync.push(Source(), 1)


@pytest.mark.parametrize(("stage", "kind", "mode"), CASES)
def test_sender_killed(stage: str, kind: str, mode: str) -> None:
    module = _module(0.0)
    with serve(ModuleReceiver(module), token=TOKEN) as server:
        with WeightSync([ReceiverTarget(server.host, server.port)], token=TOKEN, deadline_s=DEADLINE_S) as sync:
            first = sync.push(_weights(1.0), 0)
        written = PROCESSES.Event() if (stage, mode) == ("transfer", "in_place") else None
        child = PROCESSES.Process(target=_send_and_die, args=(server.port, kind, stage, signal.SIGKILL, mode, written))
        child.start()
        if written is not None:
            _eventually(lambda: server.dirty)
            written.set()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        with WeightSync([ReceiverTarget(server.host, server.port)], token=TOKEN, deadline_s=DEADLINE_S) as sync:
            if mode == "in_place" and stage != "begin":
                assert sync.status()[0].dirty and server.dirty
                with pytest.raises(DriftError):
                    sync.check(0, first.digest)
            else:
                sync.check(0, first.digest)
                assert _values(module) == {1.0}
            sync.push(_weights(3.0), 1)
        assert _values(module) == {3.0} and not server.dirty


def test_sender_frozen_is_given_up_after_the_deadline() -> None:
    module = _module(0.0)
    with serve(ModuleReceiver(module), token=TOKEN) as server:
        child = PROCESSES.Process(target=_send_and_die, args=(server.port, "shm", "transfer", signal.SIGSTOP))
        child.start()
        target = ReceiverTarget(server.host, server.port)
        _eventually(lambda: _stopped(child.pid))
        sync = WeightSync([target], token=TOKEN, deadline_s=DEADLINE_S)
        assert _try(sync.connect) == "BusyError"
        _eventually(lambda: _try(sync.connect) is None)
        sync.push(_weights(3.0), 1)
        sync.close()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(10)
    assert _values(module) == {3.0}


# -- the receiver --------------------------------------------------------------------------------------


def _receive_and_die(port: int, stage: str, how: int, ready: Connection) -> None:
    """Serve a module and stop in the middle of a stage."""
    torch.set_num_threads(1)

    def die(*args: object) -> None:
        os.kill(os.getpid(), how)
        time.sleep(60)  # the stop may reach this thread last

    module = ModuleReceiver(_module(0.0))
    if stage in ("transfer", "verify"):
        setattr(*{"transfer": (Arrival, "_take"), "verify": (Staging, "_verify")}[stage], die)
    receiver: Receiver = module
    if stage in ("begin", "commit"):
        setattr(module, {"begin": "check", "commit": "commit"}[stage], die)
    with serve(receiver, token=TOKEN, port=port) as server:
        ready.send(server.port)
        server.wait()


def _start(port: int, stage: str, how: int) -> tuple[multiprocessing.process.BaseProcess, int]:
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=_receive_and_die, args=(port, stage, how, theirs), daemon=True)
    child.start()
    assert ours.poll(30)
    return child, ours.recv()


@pytest.mark.parametrize(("stage", "kind", "mode"), CASES)
def test_receiver_killed(stage: str, kind: str, mode: str) -> None:
    child, port = _start(0, stage, signal.SIGKILL)
    with WeightSync(
        [ReceiverTarget("127.0.0.1", port)],
        token=TOKEN,
        transport=kind,  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        deadline_s=DEADLINE_S,
    ) as sync:
        start = time.monotonic()
        with pytest.raises(PeerLostError) as caught:
            sync.push(_weights(1.0), 0)
        assert time.monotonic() - start < 2 * DEADLINE_S + 2
        assert caught.value.peer and caught.value.stage in ("begin", "transfer", "verify", "commit")
        child.join(10)
        child, _ = _start(port, "never", signal.SIGKILL)
        report = sync.push(_weights(1.0), 0)
        sync.check(0, report.digest)
    child.kill()
    child.join(10)


def test_one_of_two_receivers_killed_and_the_other_is_not_left_waiting() -> None:
    module = _module(0.0)
    child, port = _start(0, "transfer", signal.SIGKILL)
    with serve(ModuleReceiver(module), token=TOKEN) as server:
        targets = [ReceiverTarget(server.host, server.port), ReceiverTarget("127.0.0.1", port)]
        with WeightSync(targets, token=TOKEN, transport="gloo", deadline_s=DEADLINE_S) as sync:
            with pytest.raises(PeerLostError):
                sync.push(_weights(1.0), 0)
            child.join(10)
            assert _values(module) == {0.0}
            child, _ = _start(port, "never", signal.SIGKILL)
            report = sync.push(_weights(1.0), 0)
            sync.check(0, report.digest)
        assert _values(module) == {1.0}
    child.kill()
    child.join(10)


@pytest.mark.parametrize(
    ("stage", "kind", "mode"),
    [
        ("begin", "shm", "staged"),
        ("transfer", "gloo", "staged"),
        ("verify", "shm", "staged"),
        ("commit", "shm", "staged"),
        ("commit", "gloo", "in_place"),
    ],
)
def test_receiver_frozen(kind: str, stage: str, mode: str) -> None:
    child, port = _start(0, stage, signal.SIGSTOP)
    settings: Any = {"token": TOKEN, "transport": kind, "mode": mode, "deadline_s": 1.0}
    sync = WeightSync([ReceiverTarget("127.0.0.1", port)], **settings)
    sync.connect()
    start = time.monotonic()
    with pytest.raises(DeadlineError):
        sync.push(_weights(1.0), 0)
    assert time.monotonic() - start < 10
    sync.close()
    child.kill()
    child.join(10)


# -- what arrives is not what should -------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("mode", ["staged", "in_place"])
def test_a_truncated_bucket(mode: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(0.0)
    settings: Any = {"token": TOKEN, "transport": "gloo", "mode": mode, "deadline_s": DEADLINE_S}
    send = GlooOutlet.send

    def cut(self: GlooOutlet, bucket: Bucket, buffer: torch.Tensor) -> None:
        send(self, bucket, buffer[: len(buffer) // 4] if bucket.index == index else buffer)

    with serve(ModuleReceiver(module), token=TOKEN) as server:
        target = ReceiverTarget(server.host, server.port)
        with WeightSync([target], bucket_bytes=BLOCK_BYTES, **settings) as sync:
            sync.push(_weights(1.0), 0)
            monkeypatch.setattr(GlooOutlet, "send", cut)
            start = time.monotonic()
            with pytest.raises((CorruptError, PeerLostError, DeadlineError)) as caught:
                sync.push(_weights(2.0), 1)
            assert time.monotonic() - start < 2 * DEADLINE_S + 2 and caught.value.stage in ("transfer", "verify")
            monkeypatch.undo()
            assert sync.status()[0].dirty == server.dirty == (mode == "in_place")
            if mode == "staged":
                assert _values(module) == {1.0}
            report = sync.push(_weights(3.0), 1)
            sync.check(1, report.digest)
    assert _values(module) == {3.0} and not server.dirty


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_wrong_shapes_in_place_leave_the_weights_whole(kind: str) -> None:
    module = _module(0.0)
    settings: Any = {"token": TOKEN, "transport": kind, "mode": "in_place", "deadline_s": DEADLINE_S}
    with serve(ModuleReceiver(module), token=TOKEN) as server:
        target = ReceiverTarget(server.host, server.port)
        with WeightSync([target], **settings) as sync:
            report = sync.push(_weights(1.0), 0)
            with pytest.raises(MismatchError, match="b is float32"):
                sync.push(_weights(2.0) | {"b": torch.zeros(8)}, 1)
            sync.check(0, report.digest)
            assert _values(module) == {1.0} and not server.dirty
            sync.push(_weights(3.0), 1)
    assert _values(module) == {3.0}


def test_a_second_sender_in_place_hears_that_the_receiver_is_busy() -> None:
    module = _module(0.0)
    settings: Any = {"token": TOKEN, "transport": "gloo", "mode": "in_place", "deadline_s": DEADLINE_S}
    settings["bucket_bytes"] = BLOCK_BYTES
    heard: list[str | None] = []

    class Source:
        """Another sender comes in the middle of the transfer, the first bucket written."""

        def metadata(self) -> Sequence[TensorMeta]:
            return as_source(_weights(1.0)).metadata()

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in _weights(1.0).items():
                if name == "b":
                    _eventually(lambda: server.dirty)
                    heard.append(_try(WeightSync([ReceiverTarget(server.host, server.port)], **settings).connect))
                yield name, tensor

    with serve(ModuleReceiver(module), token=TOKEN) as server:
        with WeightSync([ReceiverTarget(server.host, server.port)], **settings) as sync:
            report = sync.push(Source(), 0)
            sync.check(0, report.digest)
        assert heard == ["BusyError"] and _values(module) == {1.0} and not server.dirty
        with WeightSync([ReceiverTarget(server.host, server.port)], **settings) as other:
            other.push(_weights(2.0), 7)
    assert _values(module) == {2.0}


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PeerLostError, match=f"127.0.0.1:{port}"):
        WeightSync([ReceiverTarget("127.0.0.1", port)], token=TOKEN, deadline_s=1).connect()


def _stopped(pid: int | None) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "T"


def _try(act: Callable[[], object]) -> str | None:
    try:
        act()
    except SyncError as error:
        return type(error).__name__
    return None


def _eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
