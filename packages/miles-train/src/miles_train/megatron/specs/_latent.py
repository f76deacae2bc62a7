"""Layers with multi-head latent attention, dense or with experts."""

from typing import Any

from miles_train.megatron.latent_config import LATENT_NORM_EPS, LatentConfig
from miles_train.megatron.specs._moe import moe_arguments, moe_mlp
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.latent_attention import LatentAttention, Rotation
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.specs.modules import with_bias
from miles_train.megatron.upstream import (
    AttnMaskType,
    MLASelfAttentionSubmodules,
    ModuleSpec,
    TransformerConfig,
    get_mlp_module_spec_for_backend,
)


def latent_arguments(config: LatentConfig) -> dict[str, Any]:
    """Megatron's arguments for the model."""
    sparse = [int(layer in config.sparse_layers) for layer in range(config.num_layers)]
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "multi_latent_attention": True,
        "q_lora_rank": config.q_rank,
        "kv_lora_rank": config.kv_rank,
        "qk_head_dim": config.content_dim,
        "qk_pos_emb_head_dim": config.rotary_dim,
        "v_head_dim": config.value_dim,
        # Sizes what the base class of all attentions builds and latent attention builds again.
        "kv_channels": config.value_dim,
        "rope_type": "rope",
        "rotary_scaling_factor": config.yarn_factor,
        "mscale_all_dim": config.yarn_weight,
        "max_position_embeddings": config.max_positions,
        "seq_length": config.max_positions,
        "vocab_size": config.vocab_size,
        "layernorm_epsilon": config.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": not config.tied,
        **(moe_arguments(config.moe) | {"moe_layer_freq": sparse} if config.sparse_layers else {}),
    }


def latent_layers(
    config: LatentConfig, transformer: TransformerConfig, backend: BackendSpecProvider
) -> list[ModuleSpec]:
    """A spec for each layer."""
    dense = get_mlp_module_spec_for_backend(backend)
    sparse = moe_mlp(config.moe, transformer, backend) if config.sparse_layers else None
    attention = latent_attention(config, backend, backend.core_attention())
    return [
        decoder_layer(attention, sparse if layer in config.sparse_layers else dense, backend)
        for layer in range(config.num_layers)
    ]


def latent_attention(config: LatentConfig, backend: BackendSpecProvider, core_attention: Any) -> ModuleSpec:
    """Latent attention around a core attention."""
    column = backend.column_parallel_linear()
    norm = backend.layer_norm(rms_norm=True, for_qk=True)
    return ModuleSpec(
        module=LatentAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "rotation": Rotation(config.rope, config.interleaved),
            "bias": config.attention_bias,
            "norm_eps": LATENT_NORM_EPS,
        },
        submodules=MLASelfAttentionSubmodules(
            linear_proj=with_bias(backend.row_parallel_linear(), config.attention_bias),
            q_layernorm=norm,
            kv_layernorm=norm,
            linear_q_proj=column,
            linear_q_up_proj=column,
            linear_kv_up_proj=column,
            core_attention=core_attention,
        ),
    )
