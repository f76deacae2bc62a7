"""Weights of LlamaForCausalLM, SmolLM2 among them: biases of attention and MLP have a flag each."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.dense_config import DenseConfig, check_window, read_dense_config
from miles_train.megatron.weights._dense import dense_table
from miles_train.megatron.weights.table import WeightTable

# transformers/models/llama/configuration_llama.py
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
}


def read_config(config: Mapping[str, Any]) -> DenseConfig:
    """What config.json says."""
    config = {**_DEFAULTS, **config}
    check_window(config)
    bias = bool(config["attention_bias"])
    return read_dense_config(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config["mlp_bias"]))


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return dense_table(read_config(config))
