"""Layers with multi-head latent attention, dense or with experts."""

from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.latent_config import LATENT_NORM_EPS, IndexerConfig, LatentConfig
from miles_train.megatron.specs._moe import moe_arguments, moe_mlp
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.latent_attention import LatentAttention, Rotation
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.specs.modules import with_bias
from miles_train.megatron.specs.predict_more import more_tokens_block
from miles_train.megatron.specs.sparse_attention import Choice, SparseAttention
from miles_train.megatron.upstream import (
    AttnMaskType,
    MLASelfAttentionSubmodules,
    ModuleSpec,
    TransformerConfig,
    get_mlp_module_spec_for_backend,
    get_transformer_layer_offset,
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
        # Of the embedding that the base class builds and `LatentAttention` drops: the other type forbids fused kernels.
        "rope_type": "yarn",
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


def more_arguments(config: LatentConfig) -> dict[str, Any]:
    """Megatron's arguments for a model whose layers for multi-token prediction are trained."""
    return {**latent_arguments(config), "mtp_num_layers": config.num_extra_layers}


def more_layers(config: LatentConfig, transformer: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """The block of layers for multi-token prediction, each as the decoder's last one."""
    last = latent_layers(config, transformer, backend)[-1]
    return more_tokens_block([last] * config.num_extra_layers, transformer, backend)


def latent_layers(
    config: LatentConfig, transformer: TransformerConfig, backend: BackendSpecProvider
) -> list[ModuleSpec]:
    """A spec for each layer."""
    dense = get_mlp_module_spec_for_backend(backend)
    sparse = moe_mlp(config.moe, transformer, backend) if config.sparse_layers else None
    if config.indexer is None:
        cores = [backend.core_attention()] * config.num_layers
    else:
        _check_shared_choices(config.indexer, transformer)
        cores = _sparse_cores(config, config.indexer)
    return [
        decoder_layer(
            latent_attention(config, backend, core), sparse if layer in config.sparse_layers else dense, backend
        )
        for layer, core in enumerate(cores)
    ]


def _sparse_cores(config: LatentConfig, indexer: IndexerConfig) -> list[ModuleSpec]:
    """Core attention of each layer; layers that share a choice share the object that keeps it."""
    choices = {layer: Choice() for layer in indexer.full_layers}
    common = {"indexer": indexer, "rotation": Rotation(config.rope, interleaved=False)}
    return [
        ModuleSpec(
            module=SparseAttention,
            params={**common, "choice": choices[indexer.source(layer)], "is_full": layer in choices},
        )
        for layer in range(config.num_layers)
    ]


def _check_shared_choices(indexer: IndexerConfig, transformer: TransformerConfig) -> None:
    """Refuse layouts in which a layer could not see what an earlier layer chose.

    Raises:
        InputError: context parallelism; a pipeline chunk that starts with a layer without an indexer; or recomputation
            in a pipeline, where other micro-batches come between a layer and its recomputation.
    """
    if transformer.context_parallel_size > 1:
        raise _layout_error("context_parallel_size", transformer.context_parallel_size, "an indexer sees all keys")
    if len(indexer.full_layers) == transformer.num_layers or transformer.pipeline_model_parallel_size == 1:
        return
    if transformer.recompute_granularity is not None:
        rule = "layers that share an indexer's choice cannot be recomputed in a pipeline"
        raise _layout_error("recompute_granularity", transformer.recompute_granularity, rule)
    chunks = transformer.virtual_pipeline_model_parallel_size
    for stage in range(transformer.pipeline_model_parallel_size):
        for chunk in [None] if chunks is None else range(chunks):
            first = get_transformer_layer_offset(transformer, vp_stage=chunk, pp_rank=stage)
            if first not in indexer.full_layers:
                rule = (
                    f"a stage would start with layer {first}, which uses the indexer of layer {indexer.source(first)}"
                )
                raise _layout_error("pipeline_model_parallel_size", transformer.pipeline_model_parallel_size, rule)


def _layout_error(key: str, value: object, rule: str) -> InputError:
    return InputError(f"train.megatron.{key}", value, rule, "Choose another layout.")


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
