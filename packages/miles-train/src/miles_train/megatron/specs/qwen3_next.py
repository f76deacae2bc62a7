"""Qwen3NextForCausalLM in Megatron."""

from miles_train.megatron.specs._hybrid import hybrid_spec
from miles_train.megatron.weights.qwen3_next import read_config

SPEC = hybrid_spec(read_config)
