"""Bad input gets one error (setting, value, rule, way out), its own exit code, and leaves nobody behind."""

import socket
from pathlib import Path

import pytest
from main_job import ROOT, Job, job

REWARDS = """
def raises(prompt, sample):
    raise RuntimeError("no such judge")

def nan(prompt, sample):
    return float("nan")

def too_few(prompt):
    return 1.0

def fill_the_disk(groups):
    import os
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}").endswith("metrics.jsonl"):
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(name))
    return {}
"""


def refused(folder: Path, *settings: str, code: int = 2) -> str:
    """What the command says to these settings, after it ended by itself with `code`."""
    with job(folder, settings=settings) as run:
        assert run.wait() == code, run.text()
    return message(run)


def message(run: Job) -> str:
    lines = run.text().splitlines()
    assert not any(line.startswith("Traceback") for line in lines), run.text()
    assert len([line for line in lines if line.startswith("miles: error:")]) == 1, run.text()
    return run.text()


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("train.stps=3", ("train.stps", "unknown key", "'steps'")),
        ("train.steps='many'", ("train.steps", "'many'", "integer")),
        ("train.megatron.learning_rat=1", ("train.megatron.learning_rat", "Megatron", "Did you mean")),
        ("rollout.sglang.mem_fraction=0.1", ("rollout.sglang.mem_fraction", "mem_fraction_static")),
        ("train.megatron.hidden_size=32", ("train.megatron.hidden_size", "model")),
        ("hooks.reward='my_rewards:score'", ("hooks.reward", "my_rewards", "cannot be imported")),
        ("hooks.reward='miles_rollout.rewards:nothing'", ("hooks.reward", "nothing", "position_match")),
        ("data.source='miles_core.tasks:unknown'", ("data.source", "unknown", "copy_digits")),
        ("algorithm.loss.clip_low=2", ("clip_low", "2", "(0, 1]")),
        ("deterministic=1", ("deterministic", "boolean")),
    ],
)
def test_wrong_settings(setting: str, parts: tuple[str, ...], tmp_path: Path):
    text = refused(tmp_path, setting)
    assert all(part in text for part in parts), text


def test_missing_model_directory(tmp_path: Path):
    recipe = tmp_path / "own.toml"
    base = (ROOT / "recipes" / "quickstart.toml").read_text()
    recipe.write_text(base.replace('source = "miles_launch.models.tiny:make_copy_model"\n', ""))
    with job(tmp_path, recipe=recipe) as run:
        assert run.wait() == 2
    text = message(run)
    assert "model.path" in text and "runs/models/copy-tiny" in text and "config.json" in text


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ('{"prompt": "12="}\n{"prompt": 3}\n', ("prompts.jsonl", "2", "prompt")),
        ('{"prompt": "12="\n', ("prompts.jsonl", "1", "JSON")),
        ("", ("prompts.jsonl", "empty", "row")),
    ],
)
def test_malformed_prompts(rows: str, parts: tuple[str, ...], tmp_path: Path):
    (tmp_path / "prompts.jsonl").write_text(rows)
    recipe = tmp_path / "own.toml"
    base = (ROOT / "recipes" / "quickstart.toml").read_text()
    recipe.write_text(
        base.replace('source = { name = "miles_core.tasks:copy_digits", digits = 4 }', 'prompts = "prompts.jsonl"')
    )
    with job(tmp_path, recipe=recipe) as run:
        assert run.wait() == 2, run.text()
    text = message(run)
    assert any(part in text for part in parts[1:]) and parts[0] in text, text


def test_a_reward_with_the_wrong_arguments(tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    text = refused(tmp_path, "hooks.reward='my_rewards:too_few'")
    assert "(prompt)" in text and "Reward(prompt, sample)" in text, text


def test_a_port_that_is_taken(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text = refused(tmp_path, f"cluster.dashboard_port={port}")
    assert "cluster.dashboard_port" in text and str(port) in text


@pytest.mark.xdist_group("main_job")
@pytest.mark.parametrize(("reward", "part"), [("raises", "no such judge"), ("nan", "nan")])
def test_a_reward_that_fails_on_every_sample(reward: str, part: str, tmp_path: Path):
    """Each group is dropped with its reason; when none is left, the run ends and names the function."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    text = refused(tmp_path, f"hooks.reward='my_rewards:{reward}'", "reward.isolate=true", code=6)
    assert f"my_rewards:{reward}" in text and part in text, text


@pytest.mark.xdist_group("main_job")
def test_an_engine_that_cannot_start(tmp_path: Path):
    text = refused(tmp_path, "rollout.sglang.attention_backend='no_such_backend'", code=3)
    assert "could not start" in text and "no_such_backend" in text


@pytest.mark.xdist_group("main_job")
def test_a_disk_that_is_full(tmp_path: Path):
    """A hook of the driver puts /dev/full in the place of metrics.jsonl: the real write gets the real error."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    text = refused(tmp_path, "hooks.metrics='my_rewards:fill_the_disk'")
    assert "disk of runs" in text and "No space left" in text and "--resume" in text, text
