"""The decoder layer that families fill with their attention and MLP."""

from typing import Any

from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.upstream import (
    ModuleSpec,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
)


def decoder_layer(attention: ModuleSpec, mlp: Any, backend: BackendSpecProvider) -> ModuleSpec:
    """A layer that normalises before attention and before the MLP.

    Args:
        attention: as for `TransformerLayerSubmodules`, as is
        mlp: dense or a mixture of experts.
        backend: brings the norms.
    """
    norm = backend.layer_norm(rms_norm=True)
    add: Any = get_bias_dropout_add  # annotated as a class upstream, which passes this function itself
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=attention,
        self_attn_bda=add,
        pre_mlp_layernorm=norm,
        mlp=mlp,
        mlp_bda=add,
    )
    return ModuleSpec(module=TransformerLayer, submodules=submodules)
