"""The engine's half without an engine: the loader, called as the main loop calls it, on a model with its own loader.

A stock engine is examined by `miles_sync.sglang.conformance.examine`, at the top of the repository.
"""

from __future__ import annotations

import base64
import gc
import http.server
import json
import pickle
import pickletools
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from miles_sync import AuthError, CommitError, MismatchError, SyncError, WeightSync
from miles_sync.channel import Channel, Deadline, accept, listen
from miles_sync.messages import Commit, Prepare
from miles_sync.sglang import LOADER, TESTED_VERSION, TOKEN_VARIABLE, SGLangTarget, loader
from miles_sync.sglang.command import Attend, Command, Order, envelope, opened

TOKEN = "the token of these tests"


class Model(torch.nn.Module):
    """Fuses and computes like an engine's, warns of unknown names like an engine's, and can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(4, 6, bias=False)
        self.norm = torch.nn.Parameter(torch.ones(4))
        self.decay = torch.nn.Parameter(torch.ones(4))
        self.fails = False

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name in ("gate", "up"):
                self.gate_up.weight.data.narrow(0, 3 * (name == "up"), 3).copy_(weight)
            elif name == "norm":
                self.norm.data.copy_(weight)
            elif name == "decay":  # no copy can do this: it goes through here in each commit
                if self.fails:
                    raise RuntimeError("no memory")
                self.decay.data.copy_(-weight.exp())


class InProcessTarget:
    """Calls the loader on the caller's thread, as the engine's main loop would between two batches."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.name = "engine"
        self.label: str | None = "default"
        self._model = model

    def connect(self, token: str, deadline: Deadline) -> Channel:
        with listen("127.0.0.1") as listener:
            host, port = listener.getsockname()[:2]
            self.command(Attend(host, port, deadline.left()))
            return accept(listener, token, deadline, self.name)

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        self.command(Order(type(order).__name__.lower(), order.txn))
        if isinstance(order, Commit):
            self.label = str(version)  # as upstream: whatever the loader did

    def published(self, deadline: Deadline) -> str | None:
        return self.label

    def publish(self, version: str, deadline: Deadline) -> None:
        self.label = version

    def command(self, command: Command) -> None:
        loader.load(self._model, [(msgspec.json.encode(command).decode(), torch.empty(0))])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    return Model()


@pytest.fixture
def target(model: Model) -> InProcessTarget:
    return InProcessTarget(model)


@pytest.fixture
def sync(target: InProcessTarget) -> Iterator[WeightSync]:
    with WeightSync([target], token=TOKEN, deadline_s=10) as sync:
        yield sync


def _weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "gate": torch.full((3, 4), value),
        "up": torch.full((3, 4), value + 1),
        "norm": torch.full((4,), value, dtype=torch.bfloat16),
        "decay": torch.full((4,), value),
    }


def _holds(model: Model, value: float) -> bool:
    gate_up = torch.cat([torch.full((3, 4), value), torch.full((3, 4), value + 1)])
    decay = -torch.full((4,), value).exp()
    return (
        torch.equal(model.gate_up.weight, gate_up)
        and bool(model.norm.eq(value).all())
        and torch.equal(model.decay, decay)
    )


def test_weights_arrive_through_the_models_own_loader(model: Model, target: InProcessTarget, sync: WeightSync) -> None:
    for version, value in enumerate((2.0, 5.0, 5.0)):
        report = sync.push(_weights(value), version)
        assert _holds(model, value) and target.label == str(version)
        sync.check(version, report.digest)


def test_the_time_that_the_engine_takes_is_not_the_senders_silence(
    model: Model, target: InProcessTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miles_sync.staging._NOTICE_S", 0.02)
    load_weights = model.load_weights

    def slow(weights: list[tuple[str, torch.Tensor]]) -> None:
        time.sleep(1.0)
        load_weights(weights)

    monkeypatch.setattr(model, "load_weights", slow)
    with WeightSync([target], token=TOKEN, deadline_s=0.9) as sync:
        sync.push(_weights(2.0), 0)
    assert _holds(model, 2.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gates": torch.zeros(3, 4)}, "takes no such tensor: gates"),
        ({"up": None}, r"no tensor writes \(all of\) the parameter: gate_up.weight"),
        ({"up": torch.zeros(2, 4)}, "objects"),
        ({"norm": torch.zeros(5)}, "objects"),
        ({"norm": torch.zeros(1)}, "objects"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    model: Model,
    target: InProcessTarget,
    sync: WeightSync,
    change: dict[str, torch.Tensor | None],
    text: str,
) -> None:
    first = sync.push(_weights(2.0), 0)
    broken = {name: value for name, value in (_weights(3.0) | change).items() if value is not None}
    with pytest.raises(MismatchError, match=text):
        sync.push(broken, 1)
    assert _holds(model, 2.0)
    sync.check(0, first.digest)
    sync.push(_weights(3.0), 1)
    assert _holds(model, 3.0)


def test_a_loader_that_fails_in_commit_is_reported_and_its_label_put_back(
    model: Model, target: InProcessTarget, sync: WeightSync
) -> None:
    sync.push(_weights(2.0), 0)
    model.fails = True
    with pytest.raises(CommitError, match="no memory"):
        sync.push(_weights(3.0), 1)
    assert target.label == "0"
    assert sync.status()[0].dirty
    model.fails = False
    report = sync.push(_weights(3.0), 1)
    assert _holds(model, 3.0)
    sync.check(1, report.digest)


def test_changed_weights_are_seen(model: Model, sync: WeightSync) -> None:
    sync.push(_weights(2.0), 0)
    with torch.no_grad():
        model.norm[1] += 1
    assert sync.status()[0].intact is False


def test_an_engine_without_the_token_is_refused(target: InProcessTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", "some other token of a length"):
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        with pytest.raises(AuthError):
            WeightSync([target], token=TOKEN, deadline_s=5).connect()


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["{}"],
        ["not json"],
        ["x" * 100_000],
        ['{"type":"Order","what":"explode","txn":"1"}'],
        ['{"type":"Attend","host":"127.0.0.1","port":1,"deadline_s":1.0}'],
        ["model.norm.weight", "model.embed.weight"],
    ],
)
def test_the_loader_never_raises(model: Model, names: list[str]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader.load(model, [(name, torch.empty(0)) for name in names])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_stale_orders_change_nothing(model: Model, target: InProcessTarget, sync: WeightSync) -> None:
    sync.push(_weights(2.0), 0)
    for what in ("prepare", "commit"):
        target.command(Order(what, "a transaction long gone"))
    assert _holds(model, 2.0)
    assert sync.status()[0].version == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: setattr(m, "quant_config", object()), "quantised"),
        (lambda m: setattr(m.gate_up, "use_intel_amx_backend", True), "AMX"),
    ],
)
def test_weights_that_are_stored_in_another_form_are_refused(
    model: Model, sync: WeightSync, change: Callable[[Model], None], text: str
) -> None:
    change(model)
    with pytest.raises(MismatchError, match=text):
        sync.push(_weights(1.0), 0)


def test_state_goes_with_the_model() -> None:
    model = Model()
    InProcessTarget(model).command(Order("commit", "none"))
    assert model in loader._stagings
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# -- the envelope --------------------------------------------------------------------------------------


def test_the_envelope_is_a_pickle_of_one_empty_tensor() -> None:
    command = Order("commit", "ü" * 50)
    data = base64.b64decode(envelope(command))
    [(name, tensor)] = pickle.loads(data)
    assert opened(name) == command
    assert tensor.numel() == 0 and tensor.to("cpu").device.type == "cpu"
    globals_named = [arg for opcode, arg, _ in pickletools.genops(data) if opcode.name in ("GLOBAL", "STACK_GLOBAL")]
    assert globals_named == ["torch empty"]


def test_an_endless_command_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        envelope(Order("commit", "x" * 5000))


# -- the target's HTTP side ----------------------------------------------------------------------------


class _Engine(http.server.BaseHTTPRequestHandler):
    """Answers like an engine with other settings: what a sender must refuse before it sends anything."""

    info: dict[str, object]

    def do_GET(self) -> None:
        status = 200 if self.headers.get("Authorization") == "Bearer key" else 401
        body = json.dumps(self.info).encode() if status == 200 else b"no"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


GOOD_INFO = {"version": TESTED_VERSION, "custom_weight_loader": [LOADER], "tp_size": 1, "pp_size": 1, "dp_size": 1}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": "0.5.99"}, "runs SGLang 0.5.99"),
        ({"custom_weight_loader": []}, "--custom-weight-loader miles_sync.sglang.loader.load"),
        ({"custom_weight_loader": None}, "--custom-weight-loader"),
        ({"tp_size": 2}, r"tp_size=2, 1 targets were made for it: use SGLangTarget\.ranks\(url, 2\)"),
        ({"pp_size": 2}, "pp_size=2"),
        ({"quantization": "fp8"}, "quantization='fp8'"),
        ({"speculative_algorithm": "EAGLE"}, "speculative_algorithm"),
    ],
)
def test_engines_of_another_kind_are_refused(change: dict[str, object], text: str) -> None:
    with _Running(GOOD_INFO | change) as url, pytest.raises(MismatchError, match=text):
        SGLangTarget(url, api_key="key").connect(TOKEN, Deadline(5))


def test_a_wrong_key_is_named() -> None:
    with _Running(GOOD_INFO) as url, pytest.raises(AuthError, match="api_key"):
        SGLangTarget(url, api_key="other").connect(TOKEN, Deadline(5))


def test_no_engine_is_named() -> None:
    with listen("127.0.0.1") as free:
        port = free.getsockname()[1]
    with pytest.raises(SyncError, match="ConnectionRefused"):
        SGLangTarget(f"http://127.0.0.1:{port}").connect(TOKEN, Deadline(5))
    with pytest.raises(ValueError, match="must look like"):
        SGLangTarget("127.0.0.1:30000")


class _Running:
    def __init__(self, info: dict[str, object]) -> None:
        handler = type("Handler", (_Engine,), {"info": info})
        self._server = http.server.HTTPServer(("127.0.0.1", 0), handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
