"""Weights of Qwen3ForCausalLM (dense): queries and keys are normalised per head, the MLP never has biases."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.dense_config import DenseConfig, read_dense_config
from miles_train.megatron.weights._dense import dense_table
from miles_train.megatron.weights.table import WeightTable


def read_config(config: Mapping[str, Any]) -> DenseConfig:
    """What config.json says; transformers' default for a missing head_dim is 128 here, not hidden_size / heads."""
    return read_dense_config(config, qk_norm=True, mlp_bias=False, head_dim=128)


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return dense_table(read_config(config))
