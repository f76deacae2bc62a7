"""Adapters: into a torch module like any other target, and version after version into an engine's HTTP side.

Against a running engine: `examine_adapter` of miles_sync.sglang.conformance.
"""

from __future__ import annotations

import base64
import http.server
import json
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from miles_sync import ModuleReceiver, ReceiverTarget, WeightSync, serve
from miles_sync.errors import MismatchError, VersionError
from miles_sync.lora import adapter_of
from miles_sync.sglang import SGLangAdapter

TOKEN = "the token of these tests"
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


class Adapted(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base_layer = torch.nn.Linear(4, 4)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 4, bias=False)})
        for parameter in self.parameters():
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator))


def _model(seed: int) -> torch.nn.Module:
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList([Adapted(seed), Adapted(seed + 1)])})


def test_only_the_adapter_is_sent_and_only_the_adapter_changes() -> None:
    served, trained = _model(0), _model(10)
    base = {name: value.clone() for name, value in served.state_dict().items() if "base_layer" in name}
    before = {name: parameter.data_ptr() for name, parameter in served.named_parameters()}
    with (
        serve(ModuleReceiver(adapter_of(served)), token=TOKEN) as server,
        WeightSync([ReceiverTarget(server.host, server.port)], token=TOKEN, deadline_s=10) as sync,
    ):
        report = sync.push(adapter_of(trained), version=3)
        assert report.tensors == 4
        sync.check(3, report.digest)
    theirs = trained.state_dict()
    for name, value in served.state_dict().items():
        assert torch.equal(value, theirs[name] if "lora" in name else base[name])
    assert before == {name: parameter.data_ptr() for name, parameter in served.named_parameters()}


def test_a_model_without_adapter_is_named() -> None:
    with pytest.raises(ValueError, match="no parameter that belongs to an adapter"):
        adapter_of(torch.nn.Linear(2, 2))
    assert [name for name, _ in adapter_of(torch.nn.Linear(2, 2), belongs=lambda n: n == "bias").named_parameters()]


class Engine(http.server.ThreadingHTTPServer):
    """Keeps adapters as an engine does: by name, none twice."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.adapters: dict[str, dict[str, torch.Tensor]] = {}
        self.log: list[str] = []
        self.info: dict[str, Any] = {"enable_lora": True, "tp_size": 2}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        self._answer(self.server.info)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["lora_name"]
        if self.path == "/unload_lora_adapter":
            self.server.log.append(f"unload {name}")
            done = self.server.adapters.pop(name, None) is not None
        else:
            self.server.log.append(f"load {name}")
            assert len(body["serialized_named_tensors"]) == 2
            done = body["config_dict"]["r"] <= 8
            if done:
                self.server.adapters[name] = pickle.loads(base64.b64decode(body["serialized_named_tensors"][1]))
        self._answer({"success": done, "error_message": None if done else "rank"}, 200 if done else 400)

    def _answer(self, reply: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        threading.Thread(target=engine.serve_forever, args=(0.02,), daemon=True).start()
        yield engine
        engine.shutdown()


def _adapter(engine: Engine, **settings: Any) -> SGLangAdapter:
    return SGLangAdapter(f"http://127.0.0.1:{engine.server_port}", "math", **settings)


def test_a_version_is_loaded_before_the_older_is_unloaded(engine: Engine) -> None:
    adapter = _adapter(engine)
    with pytest.raises(VersionError, match="no version"):
        _ = adapter.served
    big = torch.rand(100, 100)
    for version in (1, 2, 5):
        adapter.push({"a": big[version]}, CONFIG, version)
        assert adapter.served == f"math@{version}"
        assert torch.equal(engine.adapters[adapter.served]["a"], big[version])
        assert engine.adapters[adapter.served]["a"].untyped_storage().nbytes() == 400
    assert engine.log == ["load math@1", "load math@2", "load math@5", "unload math@1"]
    adapter.close()
    assert not engine.adapters


def test_what_the_engine_refuses_changes_nothing(engine: Engine) -> None:
    adapter = _adapter(engine, keep=1)
    adapter.push({"a": torch.rand(2)}, CONFIG, 1)
    with pytest.raises(MismatchError, match="rank"):
        adapter.push({"a": torch.rand(2)}, CONFIG | {"r": 64}, 2)
    with pytest.raises(VersionError, match="versions only grow"):
        adapter.push({"a": torch.rand(2)}, CONFIG, 1)
    assert adapter.served == "math@1" and list(engine.adapters) == ["math@1"]
    adapter.push({"a": torch.rand(2)}, CONFIG, 2)
    assert list(engine.adapters) == ["math@2"]


def test_engines_without_lora_and_bad_names_are_named(engine: Engine) -> None:
    engine.info["enable_lora"] = None
    with pytest.raises(MismatchError, match="--enable-lora"):
        _adapter(engine).push({"a": torch.rand(2)}, CONFIG, 1)
    with pytest.raises(ValueError, match="no @"):
        SGLangAdapter("http://127.0.0.1:1", "a@b")
    with pytest.raises(ValueError, match="keep=0"):
        SGLangAdapter("http://127.0.0.1:1", "a", keep=0)
