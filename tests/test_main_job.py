"""The main job end to end, on this machine's CPU with the real engines."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from main_job import job
from transformers import AutoModelForCausalLM

from miles_core.observe import read_samples

pytestmark = [pytest.mark.xdist_group("main_job"), pytest.mark.timeout(600)]


STEPS = 8
REPEATABLE = ("deterministic=true", f"train.steps={STEPS}", "train.save_every=2", "observe.samples_every=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run, repeatable bit by bit, that nothing disturbed."""
    with job(tmp_path_factory.mktemp("job"), settings=REPEATABLE) as run:
        assert run.wait() == 0, run.text()
    return run.run


def logprobs_by(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Log probability of every token but the first, float32 [T-1]."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(-1, ids[1:, None])[:, 0].numpy()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_recorded_and_its_phases_add_up(finished: Path):
    steps = records(finished)
    assert [record["step"] for record in steps] == list(range(STEPS))
    for record in steps:
        phases = [v for k, v in record.items() if k.startswith("perf/time/") and k.count("/") == 2]
        assert sum(phases) - record["perf/time/step"] == pytest.approx(record["perf/time/step"], rel=1e-6)
        assert record["rollout/num_samples"] == 64
        assert record["sync/version"] == record["step"] + 1
        assert record["rollout/staleness_max"] == 0


def test_trainer_and_engine_agree_to_rounding(finished: Path):
    gaps = [record["train/logprob_gap"] for record in records(finished)]
    assert max(gaps) < 1e-5
    assert max(record["train/k3_kl"] for record in records(finished)) < 1e-9


def test_the_run_folder_holds_what_was_promised(finished: Path):
    for name in (
        "recipe.toml",
        "versions.json",
        "reward.png",
        "trace/driver.json",
        "checkpoints/latest",
        "hf/config.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (finished / "logs").iterdir()} >= {"trainer-0.log", "engine-0.log", "worker-0.log"}


def test_engine_logprobs_are_those_of_transformers(finished: Path):
    """The samples of step 0 came from the model as it was made; every one, token by token."""
    groups = read_samples(finished / "samples" / "step=000000")
    model = AutoModelForCausalLM.from_pretrained(finished.parent / "models" / "copy-tiny", dtype=torch.float32)
    samples = [sample for group in groups for sample in group.samples]
    assert len(samples) == 64
    for sample in samples:
        mask = sample.loss_mask[1:]
        found = logprobs_by(model, sample.tokens)[mask]
        assert np.abs(found - sample.rollout_logprobs[1:][mask]).max() < 1e-4


def test_the_exported_model_is_the_trained_one(finished: Path):
    first = AutoModelForCausalLM.from_pretrained(finished.parent / "models" / "copy-tiny", dtype=torch.float32)
    last = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    moved = [(a - b).abs().max().item() for a, b in zip(first.parameters(), last.parameters(), strict=True)]
    # Adam with these betas moves a weight by at most its rate, 2e-3, in one update.
    assert all(0 < change <= STEPS * 2e-3 for change in moved)


def test_interrupted_killed_and_resumed_equals_undisturbed_bit_by_bit(finished: Path, tmp_path: Path):
    """SIGTERM saves and has its own exit code; kill -9 loses what came after the checkpoint; neither leaves a trace."""
    with job(tmp_path, settings=REPEATABLE) as run:
        run.wait_until(lambda: run.metrics())
        run.process.send_signal(signal.SIGTERM)
        assert run.wait() == 75, run.text()
        assert "--resume" in run.text()
    done = len(run.metrics())
    assert done < STEPS
    with job(tmp_path, "--resume", settings=REPEATABLE) as run:
        run.wait_until(lambda: len(run.metrics()) >= min(done + 3, STEPS - 1))
        run.process.kill()
        assert run.wait() == -signal.SIGKILL
    with job(tmp_path, "--resume", settings=REPEATABLE) as run:
        assert run.wait() == 0, run.text()
    assert f"resuming runs/quickstart at step {STEPS}" not in run.text()

    assert [computed(record) for record in records(run.run)] == [computed(record) for record in records(finished)]
    weights = "hf/model.safetensors"
    assert (run.run / weights).read_bytes() == (finished / weights).read_bytes()
    for step in range(STEPS):
        ours, theirs = (read_samples(folder / "samples" / f"step={step:06d}") for folder in (run.run, finished))
        for a, b in zip(ours, theirs, strict=True):
            assert a.id == b.id
            for x, y in zip(a.samples, b.samples, strict=True):
                assert np.array_equal(x.tokens, y.tokens)
                assert np.array_equal(x.rollout_logprobs, y.rollout_logprobs)


def test_a_frozen_engine_serves_version_0_for_ever(tmp_path: Path):
    """The control: the trainer learns, the engine is never told, and the run says so."""
    with job(tmp_path, settings=("controls.freeze_engine=true", "train.steps=3")) as run:
        assert run.wait() == 0, run.text()
    assert "controls.freeze_engine" in run.text()
    steps = records(run.run)
    assert [record["sync/version"] for record in steps] == [0, 0, 0]
    assert [record["rollout/staleness_max"] for record in steps] == [0, 1, 2]
    gaps = [record["train/logprob_gap"] for record in steps]
    assert gaps[0] < 1e-5 < gaps[1] < gaps[2]


def computed(record: dict) -> dict:
    """What a step computed, without how long it took."""
    return {name: value for name, value in record.items() if not name.startswith("perf/") and name != "sync/gb_per_s"}
