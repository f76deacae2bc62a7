"""Weights of LlamaForCausalLM, SmolLM2 among them: biases of attention and MLP have a flag each."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.dense_config import DenseConfig, read_dense_config
from miles_train.megatron.weights._dense import dense_table
from miles_train.megatron.weights.table import WeightTable


def read_config(config: Mapping[str, Any]) -> DenseConfig:
    """What config.json says."""
    return read_dense_config(config, qk_norm=False, mlp_bias=bool(config.get("mlp_bias", False)))


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return dense_table(read_config(config))
