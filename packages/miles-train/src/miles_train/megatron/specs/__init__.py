"""Models in Megatron: one small module per architecture, found by the class name in config.json."""

import argparse
from collections.abc import Mapping
from typing import Any, Protocol

from miles_train.megatron.specs import llama, qwen3
from miles_train.megatron.upstream import GPTModel

__all__ = ["SPECS", "Spec"]


class Spec(Protocol):
    """What a module of this package offers."""

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Megatron's arguments for config.json."""
        ...

    def build(self, config: Mapping[str, Any], args: argparse.Namespace) -> GPTModel:
        """The model of config.json, its weights uninitialised."""
        ...


SPECS: Mapping[str, Spec] = {"LlamaForCausalLM": llama, "Qwen3ForCausalLM": qwen3}
