"""Qwen3.5 and Qwen3.6 in Megatron: their text parts, dense and with experts."""

from functools import partial

from miles_train.megatron.specs._hybrid import hybrid_spec
from miles_train.megatron.weights.qwen3_5 import read_config

DENSE = hybrid_spec(partial(read_config, experts=False))
MOE = hybrid_spec(partial(read_config, experts=True))
