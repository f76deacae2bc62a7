"""Weights of Qwen3MoeForCausalLM: attention as in Qwen3; some layers may have a dense MLP in place of experts.

Each expert is stored on its own, both on the hub and by transformers (which stacks them in memory).
"""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.dense_config import check_window, read_dense_config
from miles_train.megatron.moe_config import MoEConfig, MoEDecoder
from miles_train.megatron.weights._moe import moe_decoder_table
from miles_train.megatron.weights.table import WeightTable

# transformers/models/qwen3_moe/configuration_qwen3_moe.py
_DEFAULTS: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}


def read_config(config: Mapping[str, Any]) -> MoEDecoder:
    """What config.json says. Transformers 5 saves `num_experts` as `num_local_experts`."""
    config = {**_DEFAULTS, **config}
    check_window(config)
    bias = bool(config["attention_bias"])
    dense = read_dense_config(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
    experts = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]
    step, without = config["decoder_sparse_step"], config["mlp_only_layers"] or ()
    layers = tuple(
        layer for layer in range(dense.num_layers) if experts and layer not in without and (layer + 1) % step == 0
    )
    if not layers:
        return MoEDecoder(dense, None, ())
    moe = MoEConfig(
        num_experts=experts,
        top_k=config["num_experts_per_tok"],
        expert_size=config["moe_intermediate_size"],
        normalize=bool(config["norm_topk_prob"]),
    )
    return MoEDecoder(dense, moe, layers)


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, whatever names are stored."""
    return moe_decoder_table(read_config(config))
