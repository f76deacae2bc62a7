"""Decoders that mix gated DeltaNet with gated attention."""

from collections.abc import Callable
from typing import Any

from miles_train.megatron.hybrid_config import HybridConfig
from miles_train.megatron.specs._delta_net import delta_net
from miles_train.megatron.specs._dense import dense_arguments, gqa_attention, set_rope
from miles_train.megatron.specs._moe import moe_arguments, moe_mlp
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.build import Config, Spec
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.upstream import ModuleSpec, TransformerConfig, get_mlp_module_spec_for_backend


def hybrid_spec(read_config: Callable[[Config], HybridConfig]) -> Spec:
    """The spec of an architecture.

    Args:
        read_config: its config.json, in one checked shape.
    """
    return Spec(
        arguments=lambda config: hybrid_arguments(read_config(config)),
        layers=lambda config, transformer, backend: hybrid_layers(read_config(config), transformer, backend),
        finish=lambda model, config: set_rope(model, read_config(config).dense.rope),
    )


def hybrid_arguments(config: HybridConfig) -> dict[str, Any]:
    """Megatron's arguments for the model."""
    delta = config.delta
    sparse = [int(layer in config.moe_layers) for layer in range(config.dense.num_layers)]
    return {
        **dense_arguments(config.dense),
        "attention_output_gate": True,
        "layernorm_zero_centered_gamma": True,
        "linear_conv_kernel_dim": delta.conv_width,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        **(moe_arguments(config.moe) | {"moe_layer_freq": sparse} if config.moe else {}),
    }


def hybrid_layers(
    config: HybridConfig, transformer: TransformerConfig, backend: BackendSpecProvider
) -> list[ModuleSpec]:
    """A spec for each layer."""
    full, linear = gqa_attention(config.dense, backend), delta_net(backend)
    dense = get_mlp_module_spec_for_backend(backend)
    sparse = moe_mlp(config.moe, transformer, backend) if config.moe else None
    return [
        decoder_layer(
            full if layer in config.full_layers else linear, sparse if layer in config.moe_layers else dense, backend
        )
        for layer in range(config.dense.num_layers)
    ]
