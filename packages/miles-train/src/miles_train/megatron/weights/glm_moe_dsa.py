"""Weights of GlmMoeDsaForCausalLM: GLM-5 and 5.1, whose layers may share an indexer's choice (arXiv:2603.12201)."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.latent_config import (
    LatentConfig,
    check_layer_types,
    layers_by_type,
    read_indexer,
    read_latent_config,
    with_defaults,
)
from miles_train.megatron.weights._latent import latent_table
from miles_train.megatron.weights.table import WeightTable

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 2048,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_n_heads": 32,
}


def read_config(config: Mapping[str, Any]) -> LatentConfig:
    """What config.json says."""
    values = with_defaults(DEFAULTS, config, num_local_experts="n_routed_experts")
    return read_latent_config(
        values,
        sparse_layers=layers_by_type(values, values["first_k_dense_replace"]),
        indexer=read_indexer(values, _full_layers(values)),
    )


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return latent_table(read_config(config), stored)


def _full_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers with an indexer: by name, by a pattern of F and S, or every `index_topk_freq`-th after an offset."""
    count = values["num_hidden_layers"]
    types, pattern = values.get("indexer_types"), values.get("index_topk_pattern")
    if types is None and pattern is not None:
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
    if types is None:
        every = max(values.get("index_topk_freq", 1), 1)
        offset = values.get("index_skip_topk_offset", 2)
        return tuple(layer for layer in range(count) if max(layer - offset + 1, 0) % every == 0)
    types = check_layer_types("indexer_types", types, count, ("full", "shared"))
    return tuple(layer for layer, kind in enumerate(types) if kind == "full")
