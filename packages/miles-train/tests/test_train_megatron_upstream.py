"""What is done to Megatron-Core 0.19.2: the shim, the resume fixes, the record of its arguments."""

import dataclasses
import json
import subprocess
import sys

import pytest
import train_tiny

from miles_train.megatron.settings import known_arguments

pytestmark = pytest.mark.xdist_group("train-megatron")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    train_tiny.make_model(path)
    return path


def test_the_record_of_arguments_is_that_of_the_installed_parser(ranks):
    recorded = {argument.dest: argument for argument in known_arguments().values()}
    installed = {entry["dest"]: entry for entry in ranks.run_one("in_rank_upstream.parser_record")}
    assert set(recorded) == set(installed)
    for dest, entry in installed.items():
        if dest != "yarn_correction_range_round_to_int":  # Megatron adds it twice; nothing here reads it
            assert json.loads(json.dumps(dataclasses.asdict(recorded[dest]))) == entry


def test_the_shim_refuses_other_versions(ranks):
    message = ranks.run_one("in_rank_upstream.refuse_another_version")
    assert "megatron-core = 0.19.2" in message and "tested with 0.18.0" in message


def test_the_shim_acts_inside_its_context_alone(ranks):
    outside, inside, paused = ranks.run_one("in_rank_upstream.look_through_the_shim")
    assert outside == paused == "torch.FloatTensor"
    assert inside == ["cpu", "cpu", "cpu", "cpu", "torch.cuda.FloatTensor"]


def test_the_shim_rebinds_what_it_lists(ranks):
    assert set(ranks.run_one("in_rank_upstream.every_rebinding_is_needed").values()) == {(True, True)}


@pytest.mark.parametrize(
    ("fix", "world_size", "error"),
    [
        ("allocate_state", 1, "AssertionError"),  # of two ranks one would wait for the other
        ("tolerate_missing_step", 2, "KeyError: 'step'"),
        ("separate_steps", 2, "tensors differ"),
    ],
)
def test_without_a_fix_resuming_fails(fix, world_size, error, ranks, model_path, tmp_path):
    found = ranks.run("in_rank_upstream.resume_without", model_path, tmp_path, fix, world_size=world_size)
    assert all(text is not None and error in text for text in found), found


def test_saving_starts_no_process(ranks, model_path, tmp_path):
    assert ranks.run_one("in_rank_upstream.children_of_a_save", model_path, tmp_path) == 0


SCRIPT = """
import gc, resource, sys
from miles_core.algorithms.losses import PPOClip
from miles_train.errors import CheckpointError
from miles_train.megatron import MegatronTrainer

gc.disable()  # Python 3.12.1 can crash when it collects a BytesIO that was being written (gh-111049)
model, folder = sys.argv[1:]
trainer = MegatronTrainer(model, {"lr": 1e-3}, PPOClip())
trainer.save(folder + "/a", {"done": True})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, -1))
for write in (lambda: trainer.save(folder + "/b", {}), lambda: trainer.export(folder + "/hf")):
    try:
        write()
    except CheckpointError as error:
        print(error)
trainer.close()
"""


def test_a_plain_script_saves_and_a_full_disk_costs_nothing(model_path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(model_path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    save_error, export_error = done.stdout.splitlines()
    assert "b could not be written" in save_error and "File too large" in export_error
    assert json.loads((tmp_path / "run" / "a" / "trainer.json").read_text())["state"] == {"done": True}
    assert (tmp_path / "run" / "latest").read_text() == "a\n"
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name[0] != ".") == ["a", "latest"]
