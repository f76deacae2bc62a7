"""Adapters: a target like the base model, only smaller.

Into a torch module: `adapter_of(model)` is a module of the adapter's own parameters, the very tensors of `model`. Serve
it like any module and push another model's to it; the base weights are neither sent nor touched.

    serve(ModuleReceiver(adapter_of(engine_model)), token=token)          on the one side
    sync.push(adapter_of(trained_model), version=7)                       on the other

Into SGLang: `miles_sync.sglang.SGLangAdapter`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ADAPTER_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""Names that PEFT gives to the parts of an adapter."""


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter's name, as PEFT writes it, is that of an adapter's part."""
    return any(part in ADAPTER_PARTS for part in name.split("."))


def adapter_of(model: torch.nn.Module, *, belongs: Callable[[str], bool] = is_adapter_parameter) -> torch.nn.Module:
    """The adapter alone: a module whose parameters are those of `model` that belong to it, under the same names.

    Args:
        model: Holds a base model and an adapter.
        belongs: Says by its name whether a parameter is the adapter's.

    Returns:
        A module that shares these parameters; it has no forward pass. Raises `ValueError` where `model` has none.
    """
    root = torch.nn.Module()
    found = [(name, parameter) for name, parameter in model.named_parameters() if belongs(name)]
    if not found:
        raise ValueError("the model has no parameter that belongs to an adapter: wrap it first, or pass belongs=")
    for name, parameter in found:
        *path, last = name.split(".")
        module = root
        for part in path:
            child = module._modules.get(part)
            if child is None:
                child = torch.nn.Module()
                module.add_module(part, child)
            module = child
        module.register_parameter(last, parameter)
    return root
