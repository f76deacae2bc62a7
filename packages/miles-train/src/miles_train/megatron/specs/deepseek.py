"""DeepseekV3ForCausalLM, and the text part of KimiK25ForConditionalGeneration, in Megatron."""

from dataclasses import replace

from miles_train.megatron.specs._latent import latent_arguments, latent_layers, more_arguments, more_layers
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.specs.predict_more import PredictsMore
from miles_train.megatron.weights.deepseek import read_config

SPEC = Spec(
    arguments=lambda config: latent_arguments(read_config(config)),
    layers=lambda config, transformer, backend: latent_layers(read_config(config), transformer, backend),
)
WITH_MORE = replace(
    SPEC,
    arguments=lambda config: more_arguments(read_config(config)),
    mtp=lambda config, transformer, backend: more_layers(read_config(config), transformer, backend),
    model=PredictsMore,
)
