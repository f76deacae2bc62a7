"""Weights of Qwen3ForCausalLM (dense): queries and keys pass norms, attention's biases have one flag."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.dense_config import DenseConfig, check_window, read_dense_config
from miles_train.megatron.weights._dense import dense_table
from miles_train.megatron.weights.table import WeightTable

# transformers/models/qwen3/configuration_qwen3.py
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_config(config: Mapping[str, Any]) -> DenseConfig:
    """What config.json says."""
    config = {**_DEFAULTS, **config}
    check_window(config)
    bias = bool(config["attention_bias"])
    return read_dense_config(config, qkv_bias=bias, output_bias=bias, qk_norm=True)


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return dense_table(read_config(config))
