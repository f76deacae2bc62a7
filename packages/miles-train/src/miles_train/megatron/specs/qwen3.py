"""Qwen3ForCausalLM (dense) in Megatron."""

from miles_train.megatron.specs._dense import dense_arguments, dense_layers, set_rope
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.weights.qwen3 import read_config

SPEC = Spec(
    arguments=lambda config: dense_arguments(read_config(config)),
    layers=lambda config, transformer, backend: dense_layers(read_config(config), transformer, backend),
    finish=lambda model, config: set_rope(model, read_config(config).rope),
)
