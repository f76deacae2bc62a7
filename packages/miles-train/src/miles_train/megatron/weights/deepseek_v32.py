"""Weights of DeepseekV32ForCausalLM: DeepSeek-V3 with sparse attention, whose every layer has an indexer."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.latent_config import (
    LatentConfig,
    layers_by_type,
    read_indexer,
    read_latent_config,
    with_defaults,
)
from miles_train.megatron.weights import deepseek
from miles_train.megatron.weights._latent import latent_table
from miles_train.megatron.weights.table import WeightTable

DEFAULTS: Mapping[str, Any] = {
    **deepseek.DEFAULTS,
    "max_position_embeddings": 163840,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "num_experts": 256,
}


def read_config(config: Mapping[str, Any]) -> LatentConfig:
    """What config.json says.

    Transformers makes `num_experts` experts, of which its router knows the first `n_routed_experts`.
    """
    values = with_defaults(DEFAULTS, config, num_local_experts="num_experts")
    every_layer = tuple(range(values["num_hidden_layers"]))
    return read_latent_config(
        values,
        sparse_layers=layers_by_type(values, values["first_k_dense_replace"]),
        indexer=read_indexer(values, every_layer),
        num_stored_experts=values["num_experts"],
    )


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return latent_table(read_config(config), stored)
