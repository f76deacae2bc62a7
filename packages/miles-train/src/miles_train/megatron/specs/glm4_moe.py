"""Glm4MoeForCausalLM (GLM-4.5, 4.6 and 4.7) in Megatron."""

from dataclasses import replace

from miles_train.megatron.specs._dense import set_rope
from miles_train.megatron.specs._moe import (
    moe_decoder_arguments,
    moe_decoder_layers,
    more_decoder_arguments,
    more_decoder_layers,
)
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.specs.predict_more import PredictsMore
from miles_train.megatron.weights.glm4_moe import read_config

SPEC = Spec(
    arguments=lambda config: moe_decoder_arguments(read_config(config)),
    layers=lambda config, transformer, backend: moe_decoder_layers(read_config(config), transformer, backend),
    finish=lambda model, config: set_rope(model, read_config(config).dense.rope),
)
WITH_MORE = replace(
    SPEC,
    arguments=lambda config: more_decoder_arguments(read_config(config)),
    mtp=lambda config, transformer, backend: more_decoder_layers(read_config(config), transformer, backend),
    model=PredictsMore,
)
