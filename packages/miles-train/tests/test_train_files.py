"""Directories and checkpoints go through every layout of ranks bit for bit, and survive what goes wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_tiny

from miles_train.checkpoint_header import read_header
from miles_train.model_dir import open_model_directory

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
    ranks.run(
        "in_rank_files.round_trip", tmp_path / "model", settings, tmp_path / "hf", world_size=world_size
    )
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
