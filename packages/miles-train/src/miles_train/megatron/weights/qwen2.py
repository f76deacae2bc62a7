"""Weights of Qwen2ForCausalLM, Qwen2.5 among them: query, key and value always have biases, nothing else has."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.dense_config import DenseConfig, check_window, read_dense_config
from miles_train.megatron.weights._dense import dense_table
from miles_train.megatron.weights.table import WeightTable

# transformers/models/qwen2/configuration_qwen2.py
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read_config(config: Mapping[str, Any]) -> DenseConfig:
    """What config.json says."""
    config = {**_DEFAULTS, **config}
    check_window(config)
    return read_dense_config(config, qkv_bias=True)


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return dense_table(read_config(config))
