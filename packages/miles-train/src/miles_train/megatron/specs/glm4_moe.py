"""Glm4MoeForCausalLM (GLM-4.5, 4.6 and 4.7) in Megatron."""

from miles_train.megatron.specs._dense import set_rope
from miles_train.megatron.specs._moe import moe_decoder_arguments, moe_decoder_layers
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.weights.glm4_moe import read_config

SPEC = Spec(
    arguments=lambda config: moe_decoder_arguments(read_config(config)),
    layers=lambda config, transformer, backend: moe_decoder_layers(read_config(config), transformer, backend),
    finish=lambda model, config: set_rope(model, read_config(config).dense.rope),
)
