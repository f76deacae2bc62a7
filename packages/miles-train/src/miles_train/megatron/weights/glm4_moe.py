"""Weights of Glm4MoeForCausalLM: GLM-4.5, 4.6 and 4.7.

Each expert is stored on its own, both on the hub and by transformers (which stacks them in memory). The hub's
directories also hold layers that predict further tokens, after the last; transformers drops them.
"""

from collections.abc import Collection, Mapping
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.dense_config import read_dense_config
from miles_train.megatron.moe_config import MoEConfig, MoEDecoder
from miles_train.megatron.weights._moe import moe_decoder_table
from miles_train.megatron.weights.table import WeightTable

# transformers/models/glm4_moe/configuration_glm4_moe.py
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 131072,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
}


def read_config(config: Mapping[str, Any]) -> MoEDecoder:
    """What config.json says. `num_local_experts` is another name of `n_routed_experts`, as in transformers."""
    config = {**_DEFAULTS, **config}
    dense = read_dense_config(
        config, qkv_bias=bool(config["attention_bias"]), qk_norm=bool(config["use_qk_norm"]), partial=0.5
    )
    layers = tuple(range(config["first_k_dense_replace"], dense.num_layers))
    num_more = config.get("num_nextn_predict_layers") or 0
    if not layers:
        return MoEDecoder(dense, None, (), num_more)
    if config["n_shared_experts"] < 1:
        raise InputError(
            "n_shared_experts", config["n_shared_experts"], "must be at least 1", "Use the config that the model has."
        )
    moe = MoEConfig(
        num_experts=config["num_local_experts"] if "num_local_experts" in config else config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        expert_size=config["moe_intermediate_size"],
        score="sigmoid",
        normalize=bool(config["norm_topk_prob"]),
        scaling=float(config["routed_scaling_factor"]),
        num_groups=config["n_group"],
        top_groups=config["topk_group"],
        has_bias=True,
        router_fp32=True,
        shared_size=config["moe_intermediate_size"] * config["n_shared_experts"],
    )
    return MoEDecoder(dense, moe, layers, num_more)


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return moe_decoder_table(read_config(config))


def table_with_more(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, layers for multi-token prediction among them."""
    return moe_decoder_table(read_config(config), predicts_more=True)
