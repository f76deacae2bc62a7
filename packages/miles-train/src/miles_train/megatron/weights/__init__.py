"""Hugging Face names to Megatron parameters: one declarative table per architecture.

Importing this package imports torch, not Megatron.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.weights import (
    deepseek,
    deepseek_v4,
    deepseek_v32,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    llama,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from miles_train.megatron.weights.table import (
    Concatenated,
    Fusion,
    GroupedQKV,
    Region,
    Row,
    Stacked,
    WeightTable,
    Whole,
)
from miles_train.model_dir import ModelDirectory

__all__ = [
    "TABLES",
    "Concatenated",
    "Fusion",
    "GroupedQKV",
    "Region",
    "Row",
    "Stacked",
    "WeightTable",
    "Whole",
    "checked_table",
    "table_for",
]

TABLES: Mapping[str, Callable[[Mapping[str, Any], Collection[str]], WeightTable]] = {
    "DeepseekV4ForCausalLM": deepseek_v4.table,
    "DeepseekV3ForCausalLM": deepseek.table,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite.table,
    "KimiK25ForConditionalGeneration": deepseek.table,
    "Glm4MoeForCausalLM": glm4_moe.table,
    "DeepseekV32ForCausalLM": deepseek_v32.table,
    "GlmMoeDsaForCausalLM": glm_moe_dsa.table,
    "LlamaForCausalLM": llama.table,
    "Qwen2ForCausalLM": qwen2.table,
    "Qwen3ForCausalLM": qwen3.table,
    "Qwen3NextForCausalLM": qwen3_next.table,
    "Qwen3_5ForCausalLM": qwen3_5.dense_table,
    "Qwen3_5ForConditionalGeneration": qwen3_5.dense_table,
    "Qwen3_5MoeForCausalLM": qwen3_5.moe_table,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5.moe_table,
    "Qwen3MoeForCausalLM": qwen3_moe.table,
}


_WITH_MORE: Mapping[str, Callable[[Mapping[str, Any], Collection[str]], WeightTable]] = {
    "DeepseekV3ForCausalLM": deepseek.table_with_more,
    "Glm4MoeForCausalLM": glm4_moe.table_with_more,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite.table_with_more,
    "KimiK25ForConditionalGeneration": deepseek.table_with_more,
}


def table_for(directory: ModelDirectory, *, predicts_more: bool = False) -> WeightTable:
    """The table of a directory's architecture, checked against its tensors.

    Args:
        directory: the model.
        predicts_more: whether layers for multi-token prediction are trained; else they pass through export unchanged.

    Raises:
        InputError: an unknown architecture, a config without a needed key, or tensors that do not fit.
    """
    make = TABLES.get(directory.architecture)
    if make is None:
        raise InputError(
            f"architectures in {directory.path / 'config.json'}",
            directory.architecture,
            f"must be one of {', '.join(sorted(TABLES))}",
            "Train one of these, or name a weight table and a spec of your own in model.family.",
        )
    if predicts_more:
        make = _WITH_MORE.get(directory.architecture)
    if make is None:
        raise InputError(
            "train.megatron.mtp_loss_scaling_factor",
            "set",
            f"layers for multi-token prediction are trained for {', '.join(sorted(_WITH_MORE))} alone",
            "Remove the key: the layers then pass through export unchanged.",
        )
    return checked_table(directory, make)


def checked_table(
    directory: ModelDirectory, make: Callable[[Mapping[str, Any], Collection[str]], WeightTable]
) -> WeightTable:
    """The table that `make` makes for a directory, checked against its tensors.

    Raises:
        InputError: a config without a needed key, or tensors that do not fit.
    """
    if not (directory.config.get("text_config") or directory.config).get("is_causal", True):
        raise InputError(
            f"is_causal in {directory.path / 'config.json'}",
            False,
            "must be true: transformers then lets tokens attend to what follows them, which is not trained here",
            "Remove it, if the model was not trained that way.",
        )
    try:
        table = make(directory.config, directory.tensors.keys())
    except KeyError as error:
        raise InputError(
            str(directory.path / "config.json"),
            f"no key {error}",
            f"{directory.architecture} needs it",
            "Save the model's config again.",
        ) from None
    if not isinstance(table, WeightTable):  # a user's may not be one
        raise InputError(
            f"weight table of {directory.architecture}",
            type(table).__name__,
            "must return a WeightTable",
            "Return miles_train.megatron.weights.WeightTable(rows, num_layers).",
        )
    table.check_directory(directory)
    return table
