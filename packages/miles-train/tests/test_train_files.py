"""Directories and checkpoints go through every layout of ranks bit for bit, and survive what goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import in_rank_files
import pytest
import torch
import train_tiny
from safetensors.torch import save_file

from miles_core.errors import InputError
from miles_train.checkpoint_header import read_header
from miles_train.model_dir import open_model_directory

pytestmark = pytest.mark.xdist_group("train-megatron")  # one pool of ranks a run

HERE = Path(__file__).parent
TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PIPELINE, "num_virtual_stages_per_pipeline_rank": 2}
EXPERT = {"expert_model_parallel_size": 2}
EXPERT_TENSOR = {**TENSOR, **EXPERT, "expert_tensor_parallel_size": 1}
DENSE = {"num_hidden_layers": 4, "tie_word_embeddings": False, "vocab_size": 17, "attention_bias": True}
TIED = {"num_hidden_layers": 4}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
LAYOUTS = {
    "data": (DENSE, {}, 2),
    "tensor": (DENSE, TENSOR, 2),
    "pipeline": (TIED, PIPELINE, 2),
    "virtual": (TIED, VIRTUAL, 2),
    "tensor-pipeline": (TIED, {**TENSOR, **PIPELINE}, 4),
    "expert": (EXPERTS, EXPERT, 2),
    "expert-tensor": (EXPERTS, {**TENSOR, "expert_tensor_parallel_size": 2}, 2),
    "tensor-expert": (EXPERTS, EXPERT_TENSOR, 2),
}


def tensors_of(path):
    directory = open_model_directory(path)
    with directory.reader() as read:
        return {name: read(name) for name in directory.tensors}


def assert_equal(path, expected):
    ours, theirs = tensors_of(path), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_import_and_export_return_every_bit(ranks, tmp_path, layout):
    changes, settings, world_size = LAYOUTS[layout]
    train_tiny.make_model(tmp_path / "model", **changes)
    ranks.run("in_rank_files.round_trip", tmp_path / "model", settings, tmp_path / "hf", world_size=world_size)
    assert_equal(tmp_path / "hf", tmp_path / "model")
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) >= world_size


# Each group is one model; its checkpoint goes from the first layout through all others and back.
CHAINS = {
    "dense": (TIED, [({}, 1), (TENSOR, 2), (VIRTUAL, 2), ({**TENSOR, **PIPELINE}, 4), ({}, 2)]),
    "experts": (EXPERTS, [(EXPERT, 2), ({}, 1), (EXPERT_TENSOR, 2), (PIPELINE, 2)]),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_checkpoint_goes_through_all_layouts_bit_for_bit(ranks, tmp_path, chain):
    changes, ((first, world_size), *others) = CHAINS[chain]
    model = tmp_path / "model"
    train_tiny.make_model(model, **changes)
    ranks.run("in_rank_files.train_and_save", model, first, tmp_path, world_size=world_size)
    loaded = "saved"
    for number, (settings, size) in enumerate(others):
        saved = f"again-{number}"
        ranks.run("in_rank_files.load_and_save", model, settings, tmp_path, loaded, saved, world_size=size)
        assert_equal(tmp_path / f"hf-{saved}", tmp_path / "trained")
        loaded = saved
    ranks.run("in_rank_files.compare", model, first, tmp_path, loaded, world_size=world_size)


def test_a_save_holds_its_moment_while_training_goes_on(ranks, tmp_path):
    train_tiny.make_model(tmp_path / "model")
    ranks.run("in_rank_files.save_while_training", tmp_path / "model", tmp_path, world_size=2)
    assert_equal(tmp_path / "loaded", tmp_path / "then")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-2"]
    assert read_header(tmp_path).state == {"step": 2}
    assert not list(tmp_path.glob(".partial*"))


def test_killed_while_saving_the_older_checkpoint_stays(ranks, tmp_path):
    train_tiny.make_model(tmp_path / "model")
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
import in_rank_files
folder = Path({str(tmp_path)!r})
in_rank_files.die_while_saving((0, 1, "127.0.0.1", iter([0])), folder / "model", folder)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_header(tmp_path).state == {"step": 0}
    assert sorted(os.listdir(tmp_path)) == [".partial-b", "a", "latest", "model"]
    # The next run goes on from it, and writes what was being written again.
    ranks.run("in_rank_files.load_and_save", tmp_path / "model", {}, tmp_path, "a", "b", {"step": 0})
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "hf-b", "latest", "model"]
    assert read_header(tmp_path).state == {"step": 2}


@pytest.fixture
def full_disk(tmp_path):
    """A folder of a disk that has room for a few pages alone."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("a disk of a few pages needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_an_error_on_every_rank_and_leaves_nothing(ranks, tmp_path, full_disk):
    train_tiny.make_model(tmp_path / "model", hidden_size=64)
    for errors in ranks.run("in_rank_files.save_to_a_full_disk", tmp_path / "model", tmp_path, world_size=2):
        assert len(errors) == 3
        assert all("could not be written" in error and "No space left" in error for error in errors), errors
    assert not [name for name in os.listdir(full_disk) if not name.startswith(".partial")]
    assert read_header(tmp_path).state == {"step": 1}


def fp8_of(path, folder):
    """A copy of a model whose projections are FP8 in blocks of 16 x 32, and what they stand for."""
    shutil.copytree(path, folder)
    config = json.loads((path / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    stored, meant = {}, {}
    for name, tensor in tensors_of(path).items():
        meant[name] = stored[name] = tensor
        if "_proj" in name:
            rows, columns = tensor.shape
            scale = torch.rand(-(-rows // 16), -(-columns // 32)) + 0.5
            stored[name] = (tensor * 8).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scale
            meant[name] = in_rank_files.decode(stored[name], scale)
    save_file(stored, folder / "model.safetensors")
    return meant


@pytest.mark.parametrize("settings", [{}, TENSOR])
def test_fp8_weights_are_decoded_block_by_block(ranks, tmp_path, settings):
    # The down projection of a rank begins in the middle of a block: 40 of 80 columns.
    train_tiny.make_model(tmp_path / "model", intermediate_size=80)
    meant = fp8_of(tmp_path / "model", tmp_path / "fp8")
    size = 2 if settings else 1
    messages = ranks.run("in_rank_files.export_fp8", tmp_path / "fp8", settings, tmp_path / "hf", world_size=size)
    assert all("need a decoder" in message for message in messages)
    ours = tensors_of(tmp_path / "hf")
    assert ours.keys() == meant.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("found", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, "fp8"])
def test_other_quantisations_are_one_clear_error(tmp_path, found):
    train_tiny.make_model(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    with pytest.raises(InputError, match=r"quantization_config.*Take the unquantised model"):
        open_model_directory(tmp_path / "model")


@pytest.mark.parametrize("settings", [TENSOR])
def test_what_the_trainer_does_not_hold_passes_through_and_what_stays_float32_does(ranks, tmp_path, settings):
    train_tiny.make_model(tmp_path / "model")
    stored = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "model").items()}
    stored["visual.blocks.0.weight"] = torch.randn(7, 5, 3)
    stored["visual.index"] = torch.arange(9)
    save_file(stored, tmp_path / "model" / "model.safetensors")
    ranks.run("in_rank_files.round_trip_beside", tmp_path / "model", settings, tmp_path, world_size=2)
    assert_equal(tmp_path / "before", tmp_path / "model")
    after = tensors_of(tmp_path / "after")
    for name in ("visual.blocks.0.weight", "visual.index"):
        assert torch.equal(after[name], stored[name])
    # The marked norm moved by less than bfloat16 resolves, so it is written as it is.
    assert after["model.norm.weight"].dtype == torch.float32
    assert after["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "after" / "config.json").read_text())["dtype"] == "bfloat16"
