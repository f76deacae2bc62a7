"""Layers of the Llama line: grouped-query attention and a gated MLP."""

from functools import partial
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.dense_config import DenseConfig
from miles_train.megatron.rope import Rope
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
        "add_qkv_bias": config.qkv_bias,
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
            linear_qkv=with_bias(backend.column_parallel_linear(), config.qkv_bias),
            core_attention=backend.core_attention(),
            linear_proj=with_bias(backend.row_parallel_linear(), config.output_bias),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def set_rope(model: GPTModel, rope: Rope) -> None:
    """Give a built chunk its rotary embedding.

    Megatron's constructors know Llama 3.1's own constants and one flavour of yarn. Here the frequencies are set from
    outside, and the factor on cosine and sine where `Attention` keeps yarn's; a chunk without attention has neither.
    """
    embedding = model.rotary_pos_emb
    embedding.inv_freq = rope.inverse_frequencies().to(embedding.inv_freq.device)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            assert hasattr(module, "_yarn_concentration_factor")
            module._yarn_concentration_factor = rope.attention_factor
    if rope.max_length is not None:
        embedding.register_forward_pre_hook(partial(_check_length, rope.kind, rope.max_length))


def _check_length(kind: str, longest: int, _: object, args: tuple[Any, ...]) -> None:
    if args[0] > longest:
        raise InputError(
            "sequence length",
            args[0],
            f"must be at most {longest}: beyond it the rope_type {kind!r} of config.json changes with the length",
            "Train on shorter sequences.",
        )
