"""A push, whole: what the receiver serves afterwards, and what it refuses. Receivers are threads of this process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from miles_sync import (
    AuthError,
    BusyError,
    CommitError,
    CorruptError,
    DirtyError,
    DriftError,
    ManifestError,
    MismatchError,
    ModuleReceiver,
    ReceiverServer,
    ReceiverTarget,
    SharedArena,
    SyncError,
    TensorMeta,
    TransportError,
    VersionError,
    WeightSync,
    serve,
)
from miles_sync import routes as routes_module
from miles_sync.buckets import Bucket
from miles_sync.channel import Channel
from miles_sync.digest import BLOCK_BYTES
from miles_sync.sources import as_source, named_weights
from miles_sync.transports import Place
from miles_sync.transports.gloo import GlooInlet
from miles_sync.transports.shm import ShmInlet

TOKEN = "the token of these tests"
KINDS = ["shm", "gloo"]
MODES = ["staged", "in_place"]


def _model(seed: int, width: int = 8) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(width, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3, dtype=torch.bfloat16)
    )


def _equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = named_weights(other)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in named_weights(one).items())


@contextmanager
def _served(*modules: torch.nn.Module, **options: object) -> Iterator[WeightSync]:
    """A sender connected to one server per module."""
    servers = [serve(ModuleReceiver(module), token=TOKEN) for module in modules]
    try:
        with _sender(*servers, **options) as sync:
            yield sync
    finally:
        for server in servers:
            server.close()


def _sender(*servers: ReceiverServer, **options: object) -> WeightSync:
    targets = [ReceiverTarget(server.host, server.port) for server in servers]
    return WeightSync(targets, **{"token": TOKEN, "deadline_s": 10.0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_versions_arrive_one_after_the_other(kind: str, mode: str) -> None:
    engine = _model(0)
    addresses = [tensor.data_ptr() for tensor in named_weights(engine).values()]
    with _served(engine, transport=kind, mode=mode) as sync:
        for version in range(3):
            trainer = _model(version + 1)
            report = sync.push(trainer, version)
            assert _equal(trainer, engine)
            assert (report.version, report.tensors, report.mode) == (version, 9, mode)
            assert report.routes[0].transport == ("gloo" if kind == "gloo" else "shm")
            sync.check(version, report.digest)
    assert addresses == [tensor.data_ptr() for tensor in named_weights(engine).values()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_larger_than_a_bucket_span_several(kind: str, mode: str) -> None:
    source = {"a": torch.rand(BLOCK_BYTES + 17), "b": torch.rand(3)}
    engine = torch.nn.ParameterDict({name: torch.zeros_like(t) for name, t in source.items()})
    with _served(engine, transport=kind, mode=mode, bucket_bytes=BLOCK_BYTES) as sync:
        for version in range(2):
            source["a"] += 1
            sync.push(source, version)
            assert all(torch.equal(engine[name], source[name]) for name in source)


def test_a_repeated_push_changes_nothing_and_other_weights_are_refused() -> None:
    engine, trainer = _model(0), _model(1)
    with _served(engine) as sync:
        first = sync.push(trainer, 4)
        again = sync.push(trainer, 4)
        assert (again.digest, again.routes[0].transport) == (first.digest, "none")
        with pytest.raises(VersionError, match="other weights need a new version"):
            sync.push(_model(2), 4)
        with pytest.raises(VersionError, match="versions only grow"):
            sync.push(_model(2), 3)
        assert _equal(engine, trainer)
        assert sync.push(trainer, 5).digest == first.digest
        sync.check(5, first.digest)


class Streamed:
    """Knows its metadata, makes its tensors on the way; may fail at one of them."""

    def __init__(self, module: torch.nn.Module, fails_at: str = "") -> None:
        self._module = module
        self._fails_at = fails_at

    def metadata(self) -> Sequence[TensorMeta]:
        return as_source(self._module).metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_weights(self._module).items():
            if name == self._fails_at:
                raise KeyError("a shard is missing")
            yield name, tensor.clone()


def test_sources_are_matched_by_what_they_can() -> None:
    engine, trainer = _model(0), _model(1)
    with _served(engine) as sync:
        digests = {
            sync.push(Streamed(trainer), 0).digest,
            sync.push(((name, tensor) for name, tensor in named_weights(trainer).items()), 1).digest,
            sync.push(named_weights(trainer), 2).digest,
            sync.push(trainer, 3).digest,
        }
    assert len(digests) == 1 and _equal(engine, trainer)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w | {"extra": torch.zeros(2)}, "unknown: extra"),
        (lambda w: {k: v for k, v in w.items() if k != "2.bias"}, "missing: 2.bias"),
        (lambda w: w | {"2.bias": torch.zeros(4, dtype=torch.bfloat16)}, r"2.bias is bfloat16\[4\]"),
        (lambda w: w | {"2.bias": torch.zeros(3)}, r"2.bias is float32\[3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_changes(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], text: str
) -> None:
    engine, trainer = _model(0), _model(1)
    with _served(engine) as sync:
        sync.push(trainer, 0)
        with pytest.raises(MismatchError, match=text) as caught:
            sync.push(change(named_weights(_model(2))), 1)
        assert caught.value.stage == "begin" and caught.value.peer
        assert _equal(engine, trainer)
        sync.push(_model(2), 1)
        assert _equal(engine, _model(2))


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_a_flipped_byte_leaves_it_dirty_until_a_retry(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inlet = ShmInlet if kind == "shm" else GlooInlet
    receive = inlet.receive

    def flip(self: Any, bucket: Bucket) -> Place:
        place = receive(self, bucket)
        bytes_of = functools.cache(lambda part: place.bytes_of(part).clone())
        bytes_of(bucket.parts[0])[77] ^= 1
        return Place("flipped", bytes_of)

    receiver = ModuleReceiver(_model(0))
    with serve(receiver, token=TOKEN) as server, _sender(server, transport=kind, mode="in_place") as sync:
        first = sync.push(_model(1), 0)
        with monkeypatch.context() as patch:
            patch.setattr(inlet, "receive", flip)
            with pytest.raises(CorruptError, match="changed on the way"):
                sync.push(_model(2), 1)
        assert server.dirty and sync.status()[0].dirty and sync.status()[0].intact is False
        with pytest.raises(DirtyError, match="mixture"), receiver.serving():
            pass
        with pytest.raises(DriftError):
            sync.check(0, first.digest)
        report = sync.push(_model(2), 1)
        sync.check(1, report.digest)
        assert not server.dirty
        with receiver.serving() as module:
            assert _equal(module, _model(2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_byte_is_found_and_the_retry_is_clean(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inlet = ShmInlet if kind == "shm" else GlooInlet
    receive = inlet.receive

    def flip(self: Any, bucket: Bucket) -> Place:
        place = receive(self, bucket)
        bytes_of = functools.cache(lambda part: place.bytes_of(part).clone())
        bytes_of(bucket.parts[0])[77] ^= 1
        return Place("flipped", bytes_of)

    engine, trainer = _model(0), _model(1)
    with _served(engine, transport=kind) as sync:
        first = sync.push(trainer, 0)
        with monkeypatch.context() as patch:
            patch.setattr(inlet, "receive", flip)
            with pytest.raises(CorruptError, match="changed on the way") as caught:
                sync.push(_model(2), 1)
        assert caught.value.stage == "verify"
        assert _equal(engine, trainer)
        sync.check(0, first.digest)
        sync.push(_model(2), 1)
        assert _equal(engine, _model(2))


def test_a_transfer_in_place_that_ends_before_its_first_byte_changes_nothing() -> None:
    engine, trainer = _model(0), _model(1)
    with _served(engine, mode="in_place") as sync:
        first = sync.push(trainer, 0)
        with pytest.raises(KeyError, match="a shard is missing"):
            sync.push(Streamed(_model(2), fails_at="0.weight"), 1)
        sync.check(0, first.digest)
        assert _equal(engine, trainer)


def test_an_older_version_does_not_heal_it() -> None:
    engine = torch.nn.ParameterDict({"a": torch.zeros(BLOCK_BYTES), "b": torch.zeros(3)})
    with _served(engine, mode="in_place", bucket_bytes=BLOCK_BYTES) as sync:
        sync.push(_constant(engine, 1.0), 5)
        with pytest.raises(KeyError):
            sync.push(Streamed(_constant(engine, 2.0), fails_at="b"), 6)
        assert sync.status()[0].dirty
        with pytest.raises(VersionError, match="versions only grow"):
            sync.push(_constant(engine, 3.0), 4)
        assert sync.status()[0].dirty
        sync.push(_constant(engine, 4.0), 5)  # the version before is as good as the one that failed
        assert not sync.status()[0].dirty
        assert engine["a"].eq(4).all() and engine["b"].eq(4).all()


def test_without_a_digest_nothing_is_proven_but_everything_arrives() -> None:
    engine = _model(0)
    with _served(engine, digest=False) as sync:
        report = sync.push(_model(1), 0)
        assert report.digest == "" and _equal(engine, _model(1))
        sync.check(0, "")
        assert sync.push(_model(1), 0).routes[0].transport == "none"


@pytest.mark.parametrize("mode", MODES)
def test_an_arena_that_is_shared_is_read_where_it_lies(mode: str) -> None:
    engine, trainer = _model(0), _model(1)
    expected = {name: tensor.clone() for name, tensor in named_weights(trainer).items()}
    arena = SharedArena.adopt(trainer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in named_weights(trainer).items())
    with _served(engine, mode=mode) as sync:
        assert sync.push(arena, 0).routes[0].transport == "shm"
        assert _equal(engine, trainer)
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.mul_(2)
        sync.push(arena, 1)
        assert _equal(engine, trainer) and not torch.equal(engine[0].weight, expected["0.weight"])
    arena.segment.close()


def test_a_source_that_fails_midway_aborts() -> None:
    engine, trainer = _model(0), _model(1)
    with _served(engine) as sync:
        sync.push(trainer, 0)
        with pytest.raises(KeyError, match="a shard is missing"):
            sync.push(Streamed(_model(2), fails_at="1.bias"), 1)
        assert _equal(engine, trainer)
        sync.push(_model(2), 1)
        assert _equal(engine, _model(2))


def test_a_second_sender_is_told_who_is_connected() -> None:
    with serve(ModuleReceiver(_model(0)), token=TOKEN) as server:
        with _sender(server), pytest.raises(BusyError, match=r"connected to the sender 127\.0\.0\.1"):
            _sender(server).connect()
        with _sender(server) as free:
            free.push(_model(1), 0)


def test_a_wrong_token_is_refused() -> None:
    with serve(ModuleReceiver(_model(0)), token=TOKEN) as server, pytest.raises(AuthError, match="tokens differ"):
        _sender(server, token="not the token at all").connect()
    with pytest.raises(ValueError, match="at least 16"):
        serve(ModuleReceiver(_model(0)), token="short")


def test_the_receiver_outlives_its_sender() -> None:
    engine = _model(0)
    with serve(ModuleReceiver(engine), token=TOKEN) as server:
        with _sender(server) as sync:
            report = sync.push(_model(1), 7)
        assert server.version == 7
        with _sender(server, transport="gloo") as sync:
            sync.check(7, report.digest)
            with pytest.raises(VersionError):
                sync.push(_model(2), 6)
            sync.push(_model(2), 8)
    assert _equal(engine, _model(2))


def test_several_receivers_commit_together_or_not_at_all() -> None:
    engines = [_model(0), _model(0)]
    with _served(*engines) as sync:
        report = sync.push(_model(1), 0)
        assert {route.transport for route in report.routes} == {"shm"}
        assert all(_equal(engine, _model(1)) for engine in engines)
    odd = _model(0, width=9)
    with _served(engines[0], odd) as sync:
        with pytest.raises(MismatchError):
            sync.push(_model(2), 0)
        assert _equal(engines[0], _model(1)) and _equal(odd, _model(0, width=9))


def test_a_receiver_that_is_behind_is_caught_up_by_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [_model(0), _model(0)]
    receivers = [ModuleReceiver(engine) for engine in engines]
    servers = [serve(receiver, token=TOKEN) for receiver in receivers]
    with _sender(*servers) as sync:
        first = sync.push(_model(1), 0)
        with monkeypatch.context() as patch:
            patch.setattr(receivers[1], "install", _raise)
            with pytest.raises(CommitError, match="push it again"):
                sync.push(_model(2), 1)
        dirty = [state.dirty for state in sync.status()]
        assert dirty == [False, True]
        report = sync.push(_model(2), 1)
        assert [route.transport for route in report.routes] == ["shm", "none"]
        assert all(_equal(engine, _model(2)) for engine in engines)
        sync.check(1, report.digest)
        assert first.digest != report.digest
    for server in servers:
        server.close()


def test_weights_changed_behind_its_back_are_seen() -> None:
    engine = _model(0)
    with _served(engine) as sync:
        report = sync.push(_model(1), 0)
        with torch.no_grad():
            next(engine.parameters()).view(-1)[3] += 1
        assert sync.status()[0].intact is False
        with pytest.raises(DriftError, match="intact is False"):
            sync.check(0, report.digest)
        with pytest.raises(DriftError, match="version is 0, expected 1"):
            sync.check(1, report.digest)


def test_auto_takes_gloo_where_shared_memory_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "available_bytes", lambda: 10)
    engine = _model(0)
    with _served(engine) as sync:
        route = sync.push(_model(1), 0).routes[0]
    assert route.transport == "gloo" and "10 bytes of memory are free" in route.why
    assert _equal(engine, _model(1))


def test_auto_takes_gloo_where_memory_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(name: str) -> str:
        raise TransportError("no such file", stage="connect")

    monkeypatch.setattr("miles_sync.staging.read_probe", elsewhere)
    with _served(_model(0)) as sync:
        route = sync.push(_model(1), 0).routes[0]
    assert route.transport == "gloo" and "no such file" in route.why


def test_a_growing_model_gets_a_new_segment() -> None:
    engine = torch.nn.ParameterDict({"a": torch.zeros(4)})
    with _served(engine) as sync:
        sync.push({"a": torch.ones(4)}, 0)
        engine["b"] = torch.zeros(1000)
        sync.push({"a": torch.ones(4), "b": torch.ones(1000)}, 1)
        assert engine["b"].eq(1).all()


def test_nothing_to_send_is_an_error() -> None:
    with _served(_model(0)) as sync, pytest.raises(ManifestError, match="no tensors"):
        sync.push({}, 0)


@pytest.mark.parametrize(
    "options",
    [{"transport": "pigeon"}, {"deadline_s": 0.0}, {"bucket_bytes": 5}, {"token": "short"}, {"mode": "hasty"}],
)
def test_bad_settings_are_refused_at_once(options: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        WeightSync([ReceiverTarget("h", 1)], **{"token": TOKEN, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="different names"):
        WeightSync([ReceiverTarget("h", 1), ReceiverTarget("h", 1)], token=TOKEN)


def test_every_error_names_stage_peer_and_reason() -> None:
    error = SyncError("it said no", stage="verify", peer="engine 3")
    assert str(error) == "verify with engine 3: it said no"
    assert (error.stage, error.peer, error.reason) == ("verify", "engine 3", "it said no")


def _constant(like: torch.nn.ParameterDict, value: float) -> torch.nn.Module:
    return torch.nn.ParameterDict({name: torch.full_like(tensor, value) for name, tensor in like.items()})


def _raise(staged: object) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_connecting_with_weights_makes_what_the_first_push_needs(
    kind: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, trained = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    before = module.weight.detach().clone()
    settings: Any = {"token": TOKEN, "transport": kind, "mode": mode, "deadline_s": 10}
    with serve(ModuleReceiver(module), token=TOKEN) as server:
        sync = WeightSync([ReceiverTarget(server.host, server.port)], **settings)
        sync.connect(trained)
        sync.connect(trained)  # again is nothing new
        assert sync.status()[0].version is None and not server.dirty and torch.equal(module.weight, before)
        sent: list[str] = []
        send = Channel.send

        def note(self: Channel, message: Any, *args: Any) -> None:
            sent.append(type(message).__name__)
            send(self, message, *args)

        monkeypatch.setattr(Channel, "send", note)
        report = sync.push(trained, 0)
        monkeypatch.undo()
        assert not {"Attach", "Prepare"} & set(sent) and "Begin" in sent
        sync.check(0, report.digest)
        with pytest.raises(MismatchError):
            sync.connect(torch.nn.Linear(5, 4))
        sync.check(0, report.digest)
        sync.push(trained, 1)
        sync.close()
    assert torch.equal(module.weight, trained.weight)
