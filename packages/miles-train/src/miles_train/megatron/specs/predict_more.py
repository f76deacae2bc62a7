"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): layers that predict tokens further ahead.

Megatron's layers are used, its `GPTModel` is not quite: it runs them on every forward pass and holds all their logits.
They are run here for a gradient alone, and their hidden states go to the same output head as the model's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.upstream import (
    GPTModel,
    ModuleSpec,
    MTPLossAutoScaler,
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    TransformerConfig,
)


def more_tokens_block(
    layers: Sequence[ModuleSpec], transformer: TransformerConfig, backend: BackendSpecProvider
) -> ModuleSpec:
    """The block around decoder layers, the first of which predicts the token after the next.

    Megatron's projection takes the embedding before the hidden state, as the published weights do.

    Raises:
        InputError: a layout in which their embedding would lie on another rank, or tokens ahead would.
    """
    for key in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(transformer, key) > 1:
            raise InputError(
                f"train.megatron.{key}",
                getattr(transformer, key),
                "must be 1 where mtp_loss_scaling_factor is set",
                "Choose another layout.",
            )
    norm = backend.layer_norm(rms_norm=True)
    specs = [
        ModuleSpec(
            module=MultiTokenPredictionLayer,
            submodules=MultiTokenPredictionLayerSubmodules(
                enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=backend.column_parallel_linear(), mtp_model_layer=layer
            ),
        )
        for layer in layers
    ]
    return ModuleSpec(
        module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=specs)
    )


class PredictsMore(GPTModel):
    """A model whose output processor is also given `more_hidden_states`: those of each layer of the block, in order.

    At position i the k-th of them, from 1, has seen the tokens up to i + k and predicts the one after. Without gradient
    there are none.
    """

    def _postprocess(  # pyright: ignore[reportIncompatibleMethodOverride]  # called by name, with what it ignores
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        output_processor: Any = None,
        **rest: Any,
    ) -> Any:
        if not self.post_process:
            return hidden_states
        more: Sequence[Tensor] = ()
        if self.mtp_process and torch.is_grad_enabled() and output_processor is not None:
            everything = self.mtp(
                input_ids=input_ids,
                position_ids=position_ids,
                hidden_states=hidden_states,
                attention_mask=None,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                embedding=self.embedding,
            )
            more = everything.chunk(1 + len(self.mtp.layers))[1:]
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        if output_processor is None:
            logits, _ = self.output_layer(hidden_states, weight=weight)
            return logits.transpose(0, 1).contiguous()
        return output_processor(
            hidden_states=hidden_states, output_layer=self.output_layer, output_weight=weight, more_hidden_states=more
        )


def with_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden`, whose backward pass adds the gradient of `loss`, a number, to what it is made of."""
    return MTPLossAutoScaler.apply(hidden, loss)
