"""A tiny Qwen3 with random weights and a tokenizer of single characters, made on the spot.

It is a complete Hugging Face directory: transformers, SGLang and Megatron read it as they read any other. None of them
is needed to make it, and making it takes milliseconds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from miles_core import InputError
from miles_launch.models._directory import make_directory, write_json

Floats = NDArray[np.float32]

# Sixteen tokens: what tasks of digits need. Ids are positions in this list.
CHARACTERS = (*"0123456789=+ ",)
PAD, EOS, UNKNOWN = SPECIALS = ("<pad>", "<eos>", "<unk>")
VOCABULARY = {token: index for index, token in enumerate((*CHARACTERS, *SPECIALS))}

NUM_HEADS = 4
NUM_KV_HEADS = 2
MAX_POSITIONS = 512
# Standard deviation of every matrix, the default of transformers' Qwen3Config: the recipe was tuned from here.
INITIALIZER_RANGE = 0.02


def make_copy_model(path: str | Path, *, seed: int = 0, hidden_size: int = 64, num_layers: int = 2) -> None:
    """Write a random Qwen3ForCausalLM of 16 tokens; a directory that is there already stays as it is.

    Four query heads, two key-value heads, an MLP twice as wide as the residual stream, embedding and output head tied,
    float32. The default is 75,136 parameters.

    Args:
        path: the directory to make.
        seed: decides the weights; the same seed gives the same bytes.
        hidden_size: width of the residual stream; a multiple of 8, so that four heads have an even number of channels.
        num_layers: decoder layers.

    Raises:
        InputError: a size that no model can have, or the directory cannot be written.
    """
    if hidden_size < 8 or hidden_size % (2 * NUM_HEADS):
        raise InputError(
            "hidden_size", hidden_size, "must be a positive multiple of 8 (four heads of an even width)", "Use 64."
        )
    if seed < 0:
        raise InputError("seed", seed, "must be 0 or more", "Use 0.")
    if num_layers < 1:
        raise InputError("num_layers", num_layers, "must be at least 1", "Use 2.")

    def write(folder: Path) -> None:
        write_json(folder / "config.json", _config(hidden_size, num_layers))
        write_json(
            folder / "generation_config.json", {"eos_token_id": VOCABULARY[EOS], "pad_token_id": VOCABULARY[PAD]}
        )
        write_json(folder / "tokenizer.json", _tokenizer())
        write_json(folder / "tokenizer_config.json", _tokenizer_config())
        weights = dict(_weights(np.random.default_rng(seed), hidden_size, num_layers))
        (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    make_directory(Path(path), write)


def _config(hidden_size: int, num_layers: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": VOCABULARY[EOS],
        "head_dim": hidden_size // NUM_HEADS,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": MAX_POSITIONS,
        "model_type": "qwen3",
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": NUM_KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(VOCABULARY),
    }


def _weights(random: np.random.Generator, hidden: int, num_layers: int) -> Iterator[tuple[str, Floats]]:
    head_dim = hidden // NUM_HEADS

    def matrix(rows: int, columns: int) -> Floats:
        return random.standard_normal((rows, columns), np.float32) * np.float32(INITIALIZER_RANGE)

    def ones(size: int) -> Floats:
        return np.ones(size, np.float32)

    yield "model.embed_tokens.weight", matrix(len(VOCABULARY), hidden)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", ones(hidden)
        yield prefix + "self_attn.q_proj.weight", matrix(NUM_HEADS * head_dim, hidden)
        yield prefix + "self_attn.k_proj.weight", matrix(NUM_KV_HEADS * head_dim, hidden)
        yield prefix + "self_attn.v_proj.weight", matrix(NUM_KV_HEADS * head_dim, hidden)
        yield prefix + "self_attn.o_proj.weight", matrix(hidden, NUM_HEADS * head_dim)
        yield prefix + "self_attn.q_norm.weight", ones(head_dim)
        yield prefix + "self_attn.k_norm.weight", ones(head_dim)
        yield prefix + "post_attention_layernorm.weight", ones(hidden)
        yield prefix + "mlp.gate_proj.weight", matrix(2 * hidden, hidden)
        yield prefix + "mlp.up_proj.weight", matrix(2 * hidden, hidden)
        yield prefix + "mlp.down_proj.weight", matrix(hidden, 2 * hidden)
    yield "model.norm.weight", ones(hidden)


def _tokenizer() -> dict[str, Any]:
    """Byte-pair encoding without merges cuts text into characters; what is not in the vocabulary becomes `<unk>`."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": VOCABULARY[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in SPECIALS
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": VOCABULARY,
            "merges": [],
        },
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
