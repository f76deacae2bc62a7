"""Models in Megatron: one small module per architecture, found by the class name in config.json."""

from collections.abc import Mapping

from miles_train.megatron.specs import llama, qwen3
from miles_train.megatron.specs.build import Spec, build_chunks

__all__ = ["SPECS", "Spec", "build_chunks"]

SPECS: Mapping[str, Spec] = {"LlamaForCausalLM": llama.SPEC, "Qwen3ForCausalLM": qwen3.SPEC}
