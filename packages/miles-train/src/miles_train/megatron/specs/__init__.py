"""Models in Megatron: one small module per architecture, found by the class name in config.json."""

from collections.abc import Mapping

from miles_train.megatron.specs import (
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
from miles_train.megatron.specs.build import Spec, build_chunks

__all__ = ["SPECS", "Spec", "build_chunks", "spec_for"]

SPECS: Mapping[str, Spec] = {
    "DeepseekV3ForCausalLM": deepseek.SPEC,
    "DeepseekV4ForCausalLM": deepseek_v4.SPEC,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite.SPEC,
    "KimiK25ForConditionalGeneration": deepseek.SPEC,
    "Glm4MoeForCausalLM": glm4_moe.SPEC,
    "DeepseekV32ForCausalLM": deepseek_v32.SPEC,
    "GlmMoeDsaForCausalLM": glm_moe_dsa.SPEC,
    "LlamaForCausalLM": llama.SPEC,
    "Qwen2ForCausalLM": qwen2.SPEC,
    "Qwen3ForCausalLM": qwen3.SPEC,
    "Qwen3NextForCausalLM": qwen3_next.SPEC,
    "Qwen3_5ForCausalLM": qwen3_5.DENSE,
    "Qwen3_5ForConditionalGeneration": qwen3_5.DENSE,
    "Qwen3_5MoeForCausalLM": qwen3_5.MOE,
    "Qwen3_5MoeForConditionalGeneration": qwen3_5.MOE,
    "Qwen3MoeForCausalLM": qwen3_moe.SPEC,
}
_WITH_MORE: Mapping[str, Spec] = {
    "DeepseekV3ForCausalLM": deepseek.WITH_MORE,
    "Glm4MoeForCausalLM": glm4_moe.WITH_MORE,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite.WITH_MORE,
    "KimiK25ForConditionalGeneration": deepseek.WITH_MORE,
}


def spec_for(architecture: str, *, predicts_more: bool = False) -> Spec:
    """The spec of an architecture that `weights.table_for` knows; with trained layers for multi-token prediction."""
    return (_WITH_MORE if predicts_more else SPECS)[architecture]
