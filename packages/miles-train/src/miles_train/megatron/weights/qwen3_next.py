"""Weights of Qwen3NextForCausalLM.

As transformers 5.12 saves it and, as far as is known, as Qwen3-Next-80B-A3B is published: each expert's tensors apart.
Published directories also hold `mtp.*`, one layer of multi-token prediction, which transformers drops; here it is not
trained, and passes through export unchanged.
"""

from collections.abc import Collection, Mapping
from typing import Any

from miles_train.megatron.hybrid_config import HybridConfig, read_hybrid_config
from miles_train.megatron.weights._hybrid import holds_stacked_experts, hybrid_table
from miles_train.megatron.weights.table import WeightTable


def read_config(config: Mapping[str, Any]) -> HybridConfig:
    """What config.json says; `decoder_sparse_step` and `mlp_only_layers` say which layers have experts."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    count = config["num_experts"]

    def has_experts(layer: int) -> bool:
        return count > 0 and layer not in dense and (layer + 1) % step == 0

    return read_hybrid_config(config, has_experts, normalize=bool(config.get("norm_topk_prob", True)))


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, with experts stacked or apart as the stored names have them."""
    return hybrid_table(
        read_config(config),
        "model.",
        fused_projections=True,
        stacked_experts=holds_stacked_experts(stored),
        outside=("mtp.*",),
    )
