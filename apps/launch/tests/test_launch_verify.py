"""`miles verify`, `miles export` and `miles models` as a user meets them: their output and their exit codes."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_core import InputError
from miles_core.errors import RoleDied
from miles_launch.short_ranks import run_ranks
from miles_launch.verify import verify

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 19,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": False,
}
# Llama but for its rotary embedding, which stays as Megatron's constructor makes it.
WRONG = """
from dataclasses import replace
from miles_train.megatron.families import Family
from miles_train.megatron.specs import llama
from miles_train.megatron.weights.llama import table
FAMILY = Family(table=table, spec=replace(llama.SPEC, finish=lambda model, config: None))
"""
RANKS = """
import os, signal, time
def die(address, folder):
    open(f"{folder}/{os.getpid()}", "w").close()
    if address.rank == 0:
        while len([name for name in os.listdir(folder) if name.isdigit()]) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path):
    from miles_train.megatron.weights import llama  # noqa: PLC0415 (torch)

    path = tmp_path / "hf"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = llama.table(CONFIG).shapes()
    tensors = {
        name: 0.2 * torch.randn(shape, generator=generator) + name.endswith("norm.weight")
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def miles(*arguments, cwd=None):
    """Exit code and output of the command."""
    command = [sys.executable, "-m", "miles_launch", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)
    return done.returncode, done.stdout + done.stderr * (done.returncode > 1)


def test_a_model_agrees_with_transformers_over_two_ranks(path):
    code, output = miles("verify", path, "--set", "train.megatron.tensor_model_parallel_size=2", "--json")
    assert code == 0, output
    report = json.loads(output)
    assert report["holds"] and report["num_ranks"] == 2 and report["reference"]["class"] == "LlamaForCausalLM"
    stored = load_file(path / "model.safetensors")
    assert {gap["name"] for gap in report["gradients"]} == stored.keys()
    assert report["export"]["num_tensors"] == len(stored) and report["export"]["changed"] == []
    assert report["stored_bytes"] == sum(tensor.nbytes for tensor in stored.values())


def test_a_model_that_computes_something_else_is_told_by_exit_code_1(path, tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    code, output = miles("verify", path, "--set", "model.family=wrong:FAMILY", cwd=tmp_path)
    assert code == 1, output
    assert "does not agree" in output and "self_attn.q_proj.weight" in output
    assert f"export: {len(load_file(path / 'model.safetensors'))} tensors compared, all equal" in output


def test_what_cannot_be_compared_is_told_before_a_process_starts(path):
    def refused(message, *overrides, **config):
        (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
        with pytest.raises(InputError, match=message):
            verify(path, [f"train.megatron.{override}" for override in overrides], print)

    refused("must be one of .*LlamaForCausalLM.* model.family", architectures=["NobodysForCausalLM"])
    refused("missing: model.layers.2", num_hidden_layers=3)
    refused("must divide num_attention_heads = 4", "tensor_model_parallel_size=3")
    refused("the model has no experts", "expert_model_parallel_size=2")
    refused("float32 is compared", "bf16=true")
    with pytest.raises(InputError, match=r"this command reads only train.megatron, train.num_ranks"):
        verify(path, ["rollout.group_size=2"], print)
    with pytest.raises(InputError, match="no such directory"):
        verify(path / "nowhere", [], print)


@pytest.mark.long
def test_what_transformers_does_not_know_is_exit_code_2(path, tmp_path):
    (path / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["Nobodys"], "model_type": "nobodys"}))
    (tmp_path / "wrong.py").write_text(WRONG)
    code, output = miles("verify", path, "--set", "model.family=wrong:FAMILY", cwd=tmp_path)
    assert code == 2 and "transformers" in output and "cannot load it" in output


def test_a_rank_that_dies_ends_the_others(tmp_path, monkeypatch):
    (tmp_path / "dying_ranks.py").write_text(RANKS)
    monkeypatch.chdir(tmp_path)
    pids = tmp_path / "pids"
    pids.mkdir()
    with pytest.raises(RoleDied, match=r"rank 0 of 2 ended by signal 9"):
        run_ranks("dying_ranks:die", {"folder": str(pids)}, 2, tmp_path / "logs")
    for file in pids.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name), signal.SIG_DFL)


def test_families_say_what_they_support():
    code, output = miles("models", "--json")
    assert code == 0
    families = {family["architecture"]: family for family in json.loads(output[output.index("[") :])}
    assert families["LlamaForCausalLM"]["layouts"]["ep"] == "must be 1: the model has no experts"
    assert families["Qwen3MoeForCausalLM"]["layouts"] == dict.fromkeys(("tp", "sp", "pp", "vpp", "ep", "etp", "cp"))
    assert families["DeepseekV4ForCausalLM"]["layouts"]["tp"] is None
    assert "indexer" in families["DeepseekV32ForCausalLM"]["layouts"]["cp"]
    assert not families["KimiK25ForConditionalGeneration"]["in_transformers"]
    assert families["DeepseekV3ForCausalLM"]["precisions"] == {"float32": None, "bfloat16": None}


@pytest.mark.long
def test_a_checkpoint_is_exported_and_read_again(path, tmp_path):
    code = f"""
from miles_train.comparison import negative_log_likelihood, probe_batch
from miles_train.megatron import MegatronTrainer
trainer = MegatronTrainer({str(path)!r}, {{"lr": 1e-2}}, negative_log_likelihood)
trainer.step([probe_batch(19, 20)])
trainer.save({str(tmp_path / "checkpoints" / "step-1")!r}, {{"step": 1}})
trainer.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    layout = ("--set", "train.megatron.tensor_model_parallel_size=2")
    arguments = tmp_path / "checkpoints", tmp_path / "out", "--model", path, "--verify", "--json"
    code, output = miles("export", *arguments, *layout)
    assert code == 0, output
    report = json.loads(output)
    assert report["state"] == {"step": 1} and report["max_logprob_gap"] <= 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    code, output = miles("export", tmp_path / "checkpoints", tmp_path / "other")
    assert code == 2 and "--model HF_DIR" in output
