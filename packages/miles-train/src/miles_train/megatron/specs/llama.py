"""LlamaForCausalLM, SmolLM2 among them, in Megatron."""

import argparse
from collections.abc import Mapping
from typing import Any

from miles_train.megatron.specs._dense import dense_arguments, dense_model
from miles_train.megatron.upstream import GPTModel
from miles_train.megatron.weights.llama import read_config


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for config.json."""
    return dense_arguments(read_config(config))


def build(config: Mapping[str, Any], args: argparse.Namespace) -> GPTModel:
    """The model of config.json, its weights uninitialised."""
    return dense_model(read_config(config), args)
