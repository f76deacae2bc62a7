"""Tensor parallelism: each rank of an engine is a target, and all commit between the same two batches.

The engine here is its HTTP side alone, in this process: it hands each rank's model its own command, one request at a
time, as the engine's main loops would.
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

from miles_sync import CommitError, MismatchError, WeightSync
from miles_sync.channel import Deadline
from miles_sync.sglang import LOADER, TESTED_VERSION, TOKEN_VARIABLE, SGLangTarget, loader

TOKEN = "the token of these tests"
RANKS = 2


class Rank(torch.nn.Module):
    """Holds its rows of one weight, its columns of another, and all of a third."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.rows = torch.nn.Parameter(torch.zeros(2, 4))
        self.columns = torch.nn.Parameter(torch.zeros(4, 2))
        self.norm = torch.nn.Parameter(torch.zeros(4))
        self.fails = False

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name == "rows":
                self.rows.data.copy_(weight.narrow(0, 2 * self.rank, 2))
            elif name == "columns":
                self.columns.data.copy_(weight.narrow(1, 2 * self.rank, 2))
            elif name == "norm":
                if self.fails:
                    raise RuntimeError("no memory")
                self.norm.data.copy_(weight + 1)


class Engine(http.server.ThreadingHTTPServer):
    """Answers what a target asks."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = [Rank(rank) for rank in range(RANKS)]
        self.version = "default"
        self.paused = False
        self.commits = 0
        self.main_loop = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def update(self, body: dict[str, Any]) -> dict[str, Any]:
        payloads = body["serialized_named_tensors"]
        assert len(payloads) == RANKS and body["load_format"] == LOADER
        self.commits += "weight_version" in body
        with self.main_loop:
            for model, payload in zip(self.models, payloads, strict=True):
                loader.load(model, pickle.loads(base64.b64decode(payload)))
        self.version = body.get("weight_version", self.version)
        return {"success": True}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        known = {
            "/server_info": {"version": TESTED_VERSION, "custom_weight_loader": [LOADER], "tp_size": RANKS},
            "/model_info": {"weight_version": self.server.version},
        }
        self._answer(known[self.path])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/update_weights_from_tensor":
            self._answer(self.server.update(body))
        elif self.path == "/update_weight_version":
            self.server.version = body["new_version"]
            self._answer({"success": True})
        elif self.path == "/flush_cache":
            self._answer({}, 400 if self.server.paused else 200)
        else:
            self.server.paused = self.path == "/pause_generation"
            self._answer({})

    def _answer(self, reply: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    made = iter(range(100))  # receivers are made in the order of ranks, under the main loop's lock
    monkeypatch.setattr(loader, "_tensor_parallel", lambda: (next(made) % RANKS, RANKS))
    with Engine() as engine:
        threading.Thread(target=engine.serve_forever, args=(0.02,), daemon=True).start()
        yield engine
        engine.shutdown()


def _weights(value: float) -> dict[str, torch.Tensor]:
    ramp = torch.arange(16.0).view(4, 4)
    return {"rows": ramp + value, "columns": ramp * value, "norm": torch.full((4,), value)}


def _holds(engine: Engine, value: float) -> bool:
    weights = _weights(value)
    return all(
        torch.equal(model.rows, weights["rows"][2 * rank : 2 * rank + 2])
        and torch.equal(model.columns, weights["columns"][:, 2 * rank : 2 * rank + 2])
        and torch.equal(model.norm, weights["norm"] + 1)
        for rank, model in enumerate(engine.models)
    )


def test_every_rank_takes_its_slices_and_all_commit_in_one_request(engine: Engine) -> None:
    with WeightSync(SGLangTarget.ranks(engine.url, RANKS), token=TOKEN, deadline_s=10) as sync:
        for version, value in enumerate((2.0, 5.0)):
            report = sync.push(_weights(value), version)
            assert _holds(engine, value) and engine.version == str(version)
            assert engine.commits == version + 1
            sync.check(version, report.digest)


def test_a_rank_that_fails_in_commit_is_named_and_the_label_put_back(engine: Engine) -> None:
    with WeightSync(SGLangTarget.ranks(engine.url, RANKS), token=TOKEN, deadline_s=10) as sync:
        sync.push(_weights(2.0), 0)
        engine.models[1].fails = True
        with pytest.raises(CommitError, match=r"rank 1.*no memory"):
            sync.push(_weights(3.0), 1)
        assert engine.version == "0"
        engine.models[1].fails = False
        sync.push(_weights(3.0), 1)
        assert _holds(engine, 3.0) and engine.version == "1"


def test_the_number_of_ranks_is_checked(engine: Engine) -> None:
    with pytest.raises(MismatchError, match=r"SGLangTarget\.ranks\(url, 2\)"):
        SGLangTarget(engine.url).connect(TOKEN, Deadline(5))
    with pytest.raises(ValueError, match="tp_size=0"):
        SGLangTarget.ranks(engine.url, 0)


def test_pausing_reaches_every_main_loop(engine: Engine) -> None:
    target = SGLangTarget.ranks(engine.url, RANKS)[0]
    target.pause("in_place", deadline_s=5)
    assert engine.paused
    with pytest.raises(Exception, match="would not flush"):
        target.flush(deadline_s=5)
    target.resume(deadline_s=5)
    assert not engine.paused
    target.flush(deadline_s=5)
