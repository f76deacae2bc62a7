"""Weights of Glm4MoeLiteForCausalLM: GLM-4.7-Flash."""

from collections.abc import Collection, Mapping
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.latent_config import LatentConfig, layers_by_type, read_latent_config, with_defaults
from miles_train.megatron.weights._latent import latent_table
from miles_train.megatron.weights.table import WeightTable

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 154880,
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_attention_heads": 20,
    "n_shared_experts": 1,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.8,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "qk_nope_head_dim": 192,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
}


def read_config(config: Mapping[str, Any]) -> LatentConfig:
    """What config.json says. The first layer is dense where `mlp_layer_types` does not say otherwise.

    Raises:
        InputError: see `read_latent_config`; or `head_dim`, another name of `qk_rope_head_dim` here, contradicts it.
    """
    values = with_defaults(DEFAULTS, config, num_local_experts="n_routed_experts")
    rotary = values["qk_rope_head_dim"]
    if values.get("head_dim", rotary) != rotary:
        raise InputError("head_dim", values["head_dim"], f"must be qk_rope_head_dim = {rotary}", "Leave it out.")
    return read_latent_config(
        values, sparse_layers=layers_by_type(values, 1), interleaved=bool(values["rope_interleave"])
    )


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return latent_table(read_config(config), stored)


def table_with_more(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, layers for multi-token prediction among them."""
    return latent_table(read_config(config), stored, predicts_more=True)
