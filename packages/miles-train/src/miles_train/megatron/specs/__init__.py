"""Models in Megatron: one small module per architecture, found by the class name in config.json."""

from collections.abc import Mapping

from miles_train.megatron.specs import deepseek, glm4_moe_lite, llama, qwen3
from miles_train.megatron.specs.build import Spec, build_chunks

__all__ = ["SPECS", "Spec", "build_chunks"]

SPECS: Mapping[str, Spec] = {
    "DeepseekV3ForCausalLM": deepseek.SPEC,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite.SPEC,
    "KimiK25ForConditionalGeneration": deepseek.SPEC,
    "LlamaForCausalLM": llama.SPEC,
    "Qwen3ForCausalLM": qwen3.SPEC,
}
