"""Logits, gradients and round trips beside transformers, in float32 on the CPU."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("train-megatron")
BASE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 4}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True, "head_dim": 12}),
    "llama-attention-bias": ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    "llama-all-biases-linear-rope": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        },
    ),
    # Nine heads over three groups and a tied head, as SmolLM2-135M has them.
    "smollm2": (
        "llama",
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
}


@pytest.fixture(params=CASES, scope="module")
def directory(request, ranks, tmp_path_factory):
    model_type, values = CASES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "hf"
    ranks.run("in_rank_reference.make_reference_model", path, model_type, {**BASE, **values})
    return path


def test_logits_and_gradients_are_those_of_transformers(ranks, directory):
    result = ranks.run_one("in_rank_reference.compare_with_transformers", directory)
    ours, theirs = result["logits"]
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    for name, (gradient, reference) in result["gradients"].items():
        assert np.linalg.norm(gradient - reference) <= 1e-3 * np.linalg.norm(reference), name


@pytest.mark.parametrize("settings", [{}, {"make_vocab_size_divisible_by": 128}], ids=["exact", "padded"])
def test_import_and_export_return_every_tensor(settings, ranks, directory, tmp_path):
    ranks.run("in_rank_trainer.import_and_export", directory, settings, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
