"""Layers of the Llama line: grouped-query attention and a gated MLP."""

from typing import Any

from miles_train.megatron.dense_config import DenseConfig
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.specs.modules import with_bias
from miles_train.megatron.upstream import (
    AttnMaskType,
    GPTModel,
    IdentityOp,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    get_mlp_module_spec_for_backend,
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


def dense_layers(config: DenseConfig, transformer: TransformerConfig, backend: BackendSpecProvider) -> list[ModuleSpec]:
    """A spec for each layer."""
    mlp = get_mlp_module_spec_for_backend(backend)
    return [decoder_layer(gqa_attention(config, backend), mlp, backend)] * config.num_layers


def gqa_attention(config: DenseConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Grouped-query attention."""
    norm = backend.layer_norm(rms_norm=True, for_qk=True) if config.qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=with_bias(backend.column_parallel_linear(), config.attention_bias),
            core_attention=backend.core_attention(),
            linear_proj=with_bias(backend.row_parallel_linear(), config.attention_bias),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def set_rotary_frequencies(model: GPTModel, config: DenseConfig) -> None:
    """Megatron's constructor only knows Llama 3.1's own scaling constants."""
    inverse = config.rope.inverse_frequencies(config.head_dim)
    model.rotary_pos_emb.inv_freq = inverse.to(model.rotary_pos_emb.inv_freq.device)
