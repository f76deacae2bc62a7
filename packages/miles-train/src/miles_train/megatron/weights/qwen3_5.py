"""Weights of Qwen3.5 and Qwen3.6, whose text parts transformers 5.12 knows by the same classes, dense and with experts.

`Qwen3_5ForCausalLM` and `Qwen3_5MoeForCausalLM` are the text part alone. `...ForConditionalGeneration` directories, the
only ones on the hub, hold a vision tower besides, and their text part under "model.language_model.".

Layouts that are read, and written back as they were:

- as transformers 5.12 saves it: each expert's tensors apart, "model." or "model.language_model.";
- as public code quotes the published directories (Qwen3.5-35B-A3B, Qwen3.5-397B-A17B, Qwen3.6-35B-A3B):
  `experts.gate_up_proj` [experts, 2 * size, hidden] and `experts.down_proj` [experts, hidden, size], one of each a
  layer.

`model.visual.*`, and `mtp.*` (a layer of multi-token prediction, which transformers drops), are not trained and pass
through export unchanged. The rotary embedding has sections for time, height and width (`mrope_section`): text has the
same position in all three, so it is the plain one.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from miles_train.megatron.hybrid_config import HybridConfig, read_hybrid_config
from miles_train.megatron.weights._hybrid import holds_stacked_experts, hybrid_table
from miles_train.megatron.weights.table import WeightTable

_NESTED = "model.language_model."


def read_config(config: Mapping[str, Any], *, experts: bool) -> HybridConfig:
    """What config.json says, or its `text_config`.

    Args:
        config: config.json.
        experts: whether every layer has experts, or none. Transformers always lets their weights sum to 1,
            whatever `norm_topk_prob` says.
    """
    return read_hybrid_config(text_config(config), lambda layer: experts, normalize=True)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json for the text.

    Whether the head is tied is said beside that part.
    """
    if "text_config" not in config:
        return config
    outer = ("architectures", "tie_word_embeddings")
    return {**config["text_config"], **{key: config[key] for key in outer if key in config}}


def table(config: Mapping[str, Any], stored: Collection[str] = (), *, experts: bool) -> WeightTable:
    """Rows for config.json, with the prefix and the experts' layout of the stored names."""
    nested = any(name.startswith(_NESTED) for name in stored) if stored else "text_config" in config
    return hybrid_table(
        read_config(config, experts=experts),
        _NESTED if nested else "model.",
        fused_projections=False,
        stacked_experts=holds_stacked_experts(stored),
        outside=("mtp.*", "model.visual.*"),
    )


dense_table = partial(table, experts=False)
moe_table = partial(table, experts=True)
