"""Models of the Llama line: Llama, SmolLM2, Qwen3.

Why `GPTModel`, which 0.19 calls deprecated in favour of `HybridModel`: in 0.19.2 `HybridStack` builds its final norm
from Transformer Engine unconditionally, which needs a GPU; `HybridModel` takes no rotary scaling, gives every layer of
one kind the same spec, and has no `output_processor`, the hook through which `step` turns hidden states into logprobs
without ever holding all logits. A `GPTModel` also has the parameter names that other Megatron tools know. The choice is
made here and in `weights/_dense.py`, and nowhere else.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from miles_train.megatron.dense_config import DenseConfig
from miles_train.megatron.specs.modules import CausalAttention, RMSNorm, with_bias
from miles_train.megatron.upstream import (
    GPTModel,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    core_transformer_config_from_args,
    get_gpt_layer_local_submodules,
    gpt_model,
)


def dense_arguments(config: DenseConfig) -> dict[str, Any]:
    """Megatron's arguments for the model."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_groups,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "seq_length": config.max_positions,
        "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.attention_bias,
        "qk_layernorm": config.qk_norm,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not config.tied,
    }


def dense_model(config: DenseConfig, args: argparse.Namespace) -> GPTModel:
    """Build the model, its weights uninitialised.

    Args:
        config: the model.
        args: Megatron's arguments, among them those of `dense_arguments`.
    """
    transformer = core_transformer_config_from_args(args)
    # Typed as ModuleSpec upstream, which documents a block's submodules as well.
    spec: Any = _block_spec(config, transformer)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    with _without_deprecation_notice():
        model = GPTModel(
            transformer,
            spec,
            vocab_size=-(-config.vocab_size // multiple) * multiple,
            max_sequence_length=config.max_positions,
            parallel_output=True,
            share_embeddings_and_output_weights=config.tied,
            position_embedding_type="rope",
        )
    # The constructor only knows Llama 3.1's own scaling constants.
    inverse = config.rope.inverse_frequencies(config.head_dim)
    model.rotary_pos_emb.inv_freq = inverse.to(model.rotary_pos_emb.inv_freq.device)
    return model


def _block_spec(config: DenseConfig, transformer: TransformerConfig) -> TransformerBlockSubmodules:
    layer: Any = get_gpt_layer_local_submodules(qk_layernorm=config.qk_norm, normalization="RMSNorm")
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = CausalAttention
    attention.linear_qkv = with_bias(attention.linear_qkv, config.attention_bias)
    attention.linear_proj = with_bias(attention.linear_proj, config.attention_bias)
    if config.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * transformer.num_layers, layer_norm=RMSNorm)


@contextmanager
def _without_deprecation_notice() -> Iterator[None]:
    """Keep the notice that this module's docstring answers out of every start."""

    def other(record: logging.LogRecord) -> bool:
        return "GPTModel IS DEPRECATED" not in record.getMessage()

    gpt_model.logger.addFilter(other)
    try:
        yield
    finally:
        gpt_model.logger.removeFilter(other)
