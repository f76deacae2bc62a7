"""An architecture that Miles does not come with.

Save as my_model_family.py, and say in the recipe

    [model]
    path = "models/mine"
    family = "my_model_family:FAMILY"

This one is Qwen3 under another name. Change what differs: the table says which stored tensor is which parameter, the
spec which Megatron layers the model is made of.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from miles_train.megatron.families import Family
from miles_train.megatron.specs import qwen3 as specs
from miles_train.megatron.weights import WeightTable
from miles_train.megatron.weights import qwen3 as weights


def table(config: Mapping[str, Any], stored: Collection[str]) -> WeightTable:
    """The rows for config.json, given the names of the stored tensors."""
    return weights.table(config, stored)


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments for config.json."""
    return specs.SPEC.arguments(config)


FAMILY = Family(table=table, spec=replace(specs.SPEC, arguments=arguments))
