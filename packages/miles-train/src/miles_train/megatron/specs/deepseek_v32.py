"""DeepseekV32ForCausalLM in Megatron."""

from miles_train.megatron.specs._latent import latent_arguments, latent_layers
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.weights.deepseek_v32 import read_config

SPEC = Spec(
    arguments=lambda config: latent_arguments(read_config(config)),
    layers=lambda config, transformer, backend: latent_layers(read_config(config), transformer, backend),
)
