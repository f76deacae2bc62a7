"""A tiny random model and batches for it; needs neither transformers nor Megatron."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from miles_train.conformance import Subject
from miles_train.megatron.weights import TABLES

VOCAB = 16
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "model_type": "qwen3",
}


def make_model(path, **changes):
    """Write a model of random weights, and an empty tokenizer."""
    config = {**CONFIG, **changes}
    generator = torch.Generator().manual_seed(0)
    shapes = TABLES[config["architectures"][0]](config).shapes()
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")


def batch_of(seed=0, num_samples=12):
    """Samples of uneven lengths for it."""
    return Subject(lambda: None, Path(), VOCAB).batch(seed, num_samples)
