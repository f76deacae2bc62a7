"""Weights of DeepseekV3ForCausalLM (DeepSeek-V3 and R1, Kimi K2, Moonlight) and of Kimi K2.5 and K2.6 around it.

Kimi K2.5's directory keeps the text model under "language_model." and its config under "text_config"; its vision tower
passes through export unchanged.
"""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.latent_config import LatentConfig, layers_by_type, read_latent_config, with_defaults
from miles_train.megatron.weights._latent import latent_table
from miles_train.megatron.weights.table import WeightTable

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
}


def read_config(config: Mapping[str, Any]) -> LatentConfig:
    """What config.json says."""
    text = config.get("text_config")
    values = with_defaults(DEFAULTS, config if text is None else text, num_local_experts="n_routed_experts")
    dense = values["first_k_dense_replace"]
    return read_latent_config(
        values,
        sparse_layers=layers_by_type({"num_hidden_layers": values["num_hidden_layers"]}, dense),
        interleaved=bool(values["rope_interleave"]),
        prefix="" if text is None else "language_model.",
    )


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json; `stored` tells what lies beside the text model."""
    return latent_table(read_config(config), stored)


def table_with_more(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, layers for multi-token prediction among them."""
    return latent_table(read_config(config), stored, predicts_more=True)
