import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from miles_core.config import ObserveSection
from miles_core.observe import open_sinks
from miles_core.observe.sinks import TensorBoardSink, WandbSink, redact

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="extra tensorboard")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="extra wandb")


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [({"tensorboard": True}, "tensorboard", "tensorboard"), ({"wandb": "project"}, "wandb", "wandb")],
)
def test_a_missing_library_is_an_error_that_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], module: str, extra: str
):
    for name in (module, f"{module}.summary"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'pip install "miles-core\[{extra}\]"'):
        open_sinks(ObserveSection(**setting), tmp_path, "run", {})


def test_no_sinks_unless_asked_for(tmp_path: Path):
    assert open_sinks(ObserveSection(), tmp_path, "run", {}) == []
    assert not list(tmp_path.iterdir())


def test_values_of_keys_named_like_secrets_are_left_out():
    config = {
        "train": {"steps": 3, "megatron": {"lr": 1.0}},
        "rollout": {"max_new_tokens": 16, "sglang": {"api_key": "s3cret", "admin-api-key": "s3cret"}},
        "hooks": {"reward": {"name": "a:b", "HF_TOKEN": "s3cret", "key": "s3cret", "monkey": 1}},
        "more": [{"password": "s3cret"}, {"credentials": {"user": "s3cret"}}, ("x", {"client_secret": "s3cret"})],
        "tokens": 5,
    }
    clean = redact(config)
    assert "s3cret" not in repr(clean)
    assert clean["train"] == config["train"]
    assert clean["rollout"]["max_new_tokens"] == 16 and clean["tokens"] == 5
    assert clean["hooks"]["reward"] == {"name": "a:b", "HF_TOKEN": "***", "key": "***", "monkey": 1}


@needs_tensorboard
def test_tensorboard_reads_back_what_was_written(tmp_path: Path):
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path / "events")
    for step in range(3):
        sink.write(step, {"rollout/reward": step / 2, "perf/tokens_per_s": 5})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tensors = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("rollout/reward")]
    assert tensors == [(0, 0.0), (1, 0.5), (2, 1.0)]


@needs_wandb
def test_wandb_keeps_the_curves_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["miles", "--set", "rollout.sglang.api_key=s3cret"])
    sink = WandbSink("project", "run", tmp_path, {"api_key": "s3cret", "steps": 2})
    print("s3cret on the terminal")
    sink.write(0, {"rollout/reward": 0.125})
    sink.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"rollout/reward" in path.read_bytes() for path in files)
    assert not [path for path in files if b"s3cret" in path.read_bytes()]
