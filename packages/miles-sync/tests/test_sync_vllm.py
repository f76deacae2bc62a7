"""The vLLM adapter against a stub that is held to what vLLM 0.33.0's wheel has."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import miles_sync.vllm
from miles_sync import AuthError, MismatchError, WeightSync
from miles_sync.vllm import BACKEND, TESTED_VERSION, VLLMTarget, register

TOKEN = "the token of these tests"


def _stub() -> Any:
    """The file beside this one: test files are no package."""
    spec = importlib.util.spec_from_file_location("vllm_stub", Path(__file__).with_name("vllm_stub.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub = _stub()


class Model(torch.nn.Module):
    """One of several ranks: fuses, and slices by rows."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        self.rank, self.rows = rank, 4 // ranks
        self.gate_up = torch.nn.Linear(3, 2 * self.rows, bias=False)
        self.norm = torch.nn.Parameter(torch.ones(3))

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name == "norm":
                self.norm.data.copy_(weight)
            else:
                part = weight.narrow(0, self.rank * self.rows, self.rows)
                self.gate_up.weight.data.narrow(0, self.rows * (name == "up"), self.rows).copy_(part)

    def holds(self, weights: dict[str, torch.Tensor]) -> bool:
        fresh = Model(self.rank, 4 // self.rows)
        fresh.load_weights(list(weights.items()))
        return all(torch.equal(a, b) for a, b in zip(self.parameters(), fresh.parameters(), strict=True))


def _weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator)
        for name, shape in (("gate", (4, 3)), ("up", (4, 3)), ("norm", (3,)))
    }


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MILES_SYNC_TOKEN", TOKEN)
    with stub.installed():
        register()
        yield


def test_the_stub_is_what_the_wheel_has() -> None:
    assert stub.VERSION == TESTED_VERSION
    for name, methods in stub.RECORDED.items():
        kind: Any = getattr(stub, name)
        for method, arguments in methods.items():
            code = inspect.getattr_static(kind, method)
            code = code.__func__ if isinstance(code, classmethod) else code
            assert list(inspect.signature(code).parameters) == arguments, (name, method)
    source = "".join(path.read_text() for path in Path(miles_sync.vllm.__file__).parent.glob("*.py"))
    assert source.count("\n") < 200


@pytest.mark.parametrize("mode", ["staged", "in_place"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_arrive_in_every_rank(ranks: int, mode: str) -> None:
    models = [Model(rank, ranks) for rank in range(ranks)]
    workers = [stub.Worker(stub.config(rank, ranks), model) for rank, model in enumerate(models)]
    settings: Any = {"token": TOKEN, "mode": mode, "deadline_s": 20}
    with stub.server(workers) as (url, state):
        targets = VLLMTarget.ranks(url, ranks)
        with WeightSync(targets, **settings) as sync:
            for version in range(3):
                report = sync.push(_weights(version), version)
                assert all(model.holds(_weights(version)) for model in models)
                assert state["weight_version"] == str(version)
                sync.check(version, report.digest)
            with torch.no_grad():
                models[-1].norm[0] += 1
            assert [status.intact for status in sync.status()] == [True] * (ranks - 1) + [False]
    commits = 3  # together; the plan is recorded rank by rank, and in place each rank hears of each transaction
    prepares = ranks * (1 if mode == "staged" else 3)
    assert state["calls"].count("start_weight_update") == commits + prepares


def test_what_does_not_fit_changes_nothing() -> None:
    model = Model()
    with stub.server([stub.Worker(stub.config(), model)]) as (url, state):
        target = VLLMTarget(url)
        with WeightSync([target], token=TOKEN, deadline_s=20) as sync:
            first = sync.push(_weights(0), 0)
            with pytest.raises(MismatchError, match=r"takes no such tensor|no tensor writes"):
                sync.push({"gates": torch.zeros(4, 3)}, 1)
            sync.check(0, first.digest)
            assert model.holds(_weights(0)) and state["weight_version"] == "0"
            sync.push(_weights(1), 1)
    assert model.holds(_weights(1))


@pytest.mark.parametrize(
    "setting", [{"quantization": "fp8"}, {"pipeline_parallel_size": 2}, {"data_parallel_size": 2}], ids=str
)
def test_settings_that_loading_over_cannot_serve_are_refused(setting: dict[str, Any]) -> None:
    model = Model()
    with stub.server([stub.Worker(stub.config(**setting), model)]) as (url, _):
        target = VLLMTarget(url)
        with (
            WeightSync([target], token=TOKEN, deadline_s=20) as sync,
            pytest.raises(MismatchError, match=f"{next(iter(setting))}="),
        ):
            sync.push(_weights(0), 0)


def test_wrong_number_of_ranks_and_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub.server([stub.Worker(stub.config(), Model())]) as (url, _):
        with pytest.raises(MismatchError, match=r"1 ranks, 2 targets"):
            WeightSync(VLLMTarget.ranks(url, 2), token=TOKEN).connect()
        monkeypatch.setenv("MILES_SYNC_TOKEN", "another one, of enough characters")
        with pytest.raises(AuthError):
            WeightSync([VLLMTarget(url)], token=TOKEN, deadline_s=5).connect()


def test_the_backend_is_found_by_its_name_and_reads_nothing_else() -> None:
    worker = stub.Worker(stub.config(), Model())
    assert worker.vllm_config.weight_transfer_config.backend == BACKEND
    with pytest.raises(ValueError, match="Invalid info"):
        worker.init_weight_transfer_engine({"address": "10.0.0.1"})
    worker.start_weight_update()
    worker.update_weights([{"what": "commit", "txn": "stale"}])  # of no transaction: ignored
    worker.finish_weight_update()
