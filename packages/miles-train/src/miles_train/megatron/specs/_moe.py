"""The mixture-of-experts block of every family that has one: Megatron's `MoELayer` with a router of ours.

Megatron's dispatchers, experts and shared experts are used as they are. Its `TopKRouter` computes other weights than
the models were trained with (megatron/core/transformer/moe/moe_utils.py, 0.19.2, beside the routers of transformers):

- `group_limited_topk` scores a group by its best top_k / top_groups experts; the models by the best two, always;
- sigmoid scores are always divided by their sum, but never where top_k is 1; the models have a switch for it;
- softmax with top_k = 1 refuses to normalise (the weight is then 1 and teaches the router nothing, yet models have it);
- which of equal scores it takes differs between passes with and without gradients (`sorted=torch.is_grad_enabled()`).

One difference stays, of rounding only: an expert's weight multiplies the input of its down projection, in transformers
the output.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miles_train.megatron.moe_config import MoEConfig, MoEDecoder
from miles_train.megatron.specs._dense import dense_arguments, gqa_attention
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.specs.predict_more import more_tokens_block
from miles_train.megatron.upstream import (
    ModuleSpec,
    MoELayer,
    TopKRouter,
    TransformerConfig,
    get_mlp_module_spec_for_backend,
    get_moe_module_spec_for_backend,
)

_SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


def moe_decoder_arguments(config: MoEDecoder) -> dict[str, Any]:
    """Megatron's arguments for a decoder with grouped-query attention and experts."""
    return dense_arguments(config.dense) | (moe_arguments(config.moe) if config.moe else {})


def moe_decoder_layers(
    config: MoEDecoder, transformer: TransformerConfig, backend: BackendSpecProvider
) -> list[ModuleSpec]:
    """A spec for each layer of such a decoder."""
    attention = gqa_attention(config.dense, backend)
    dense = get_mlp_module_spec_for_backend(backend)
    mlps = [dense] * config.dense.num_layers
    if config.moe:
        moe = moe_mlp(config.moe, transformer, backend)
        mlps = [moe if layer in config.layers else dense for layer in range(config.dense.num_layers)]
    return [decoder_layer(attention, mlp, backend) for mlp in mlps]


def more_decoder_arguments(config: MoEDecoder) -> dict[str, Any]:
    """Megatron's arguments for such a decoder whose layers for multi-token prediction are trained."""
    return moe_decoder_arguments(config) | {"mtp_num_layers": config.num_more_layers}


def more_decoder_layers(config: MoEDecoder, transformer: TransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """The block of layers for multi-token prediction, each as the decoder's last one."""
    last = moe_decoder_layers(config, transformer, backend)[-1]
    return more_tokens_block([last] * config.num_more_layers, transformer, backend)


def moe_arguments(config: MoEConfig) -> dict[str, Any]:
    """Megatron's arguments for the experts; what differs from transformers lies in `Router`. No auxiliary losses."""
    return {
        "num_experts": config.num_experts,
        "moe_ffn_hidden_size": config.expert_size,
        "moe_router_topk": config.top_k,
        "moe_router_score_function": config.score,
        "moe_router_pre_softmax": config.score == "softmax",
        "moe_router_num_groups": config.num_groups if config.is_grouped else None,
        "moe_router_group_topk": config.top_groups if config.is_grouped else None,
        "moe_router_topk_scaling_factor": config.scaling,
        "moe_router_enable_expert_bias": config.has_bias,
        "moe_router_dtype": "fp32" if config.router_fp32 else None,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_shared_expert_intermediate_size": config.shared_size or None,
        "moe_shared_expert_gate": config.shared_gate,
    }


def moe_mlp(
    config: MoEConfig,
    transformer: TransformerConfig,
    backend: BackendSpecProvider,
    router: "Callable[..., Router] | None" = None,
) -> Any:
    """The block, as `decoder_layer` takes an MLP.

    Args:
        config: of the experts.
        transformer: made from `moe_arguments`.
        backend: brings linears and experts.
        router: a subclass of `Router`; None for itself.
    """
    stock: Any = get_moe_module_spec_for_backend(
        backend, num_experts=config.num_experts, moe_grouped_gemm=transformer.moe_grouped_gemm
    )
    submodules = replace(stock.keywords["submodules"], router=partial(router or Router, routing=config))
    return partial(MoELayer, submodules=submodules)


class Router(TopKRouter):
    """Chooses experts and weighs them as transformers does.

    The choice goes through `RouterReplay` like Megatron's own, so recorded routes can be replayed. The expert bias is
    as the model directory has it: it stays in float32, and no step changes it.
    """

    def __init__(self, config: TransformerConfig, *, routing: MoEConfig, **kwargs: Any):
        """Build it as Megatron builds routers.

        Args:
            config: made from `moe_arguments(routing)`.
            routing: how to choose and weigh.
            kwargs: Megatron's process groups and what else it hands a router.
        """
        super().__init__(config=config, **kwargs)
        self.routing_config = routing
        self.frozen_expert_bias = True

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weigh each token's experts.

        Args:
            logits: [S, B, experts].
            padding_mask: unused: padding only matters to losses that balance the load.

        Returns:
            Weights [S * B, experts] in the logits' dtype, 0 for those not chosen; and which are chosen, bool.
        """
        routing = self.routing_config
        flat = logits.view(-1, routing.num_experts)
        scores = _SCORES[routing.score](flat.float())
        chosen = self._choose(scores.detach())
        weights = scores.gather(1, chosen)
        if routing.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        rows = torch.arange(len(flat), device=flat.device)[:, None]
        # Not scatter, which is not deterministic on a GPU.
        probs = torch.zeros_like(flat).index_put((rows, chosen), (weights * routing.scaling).type_as(flat))
        is_chosen = torch.zeros_like(flat, dtype=torch.bool).index_put((rows, chosen), torch.ones_like(chosen).bool())
        return probs, is_chosen

    def _choose(self, scores: Tensor) -> Tensor:
        """The experts of each token, [tokens, top_k]; scores are [tokens, experts]."""
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        if self.router_replay is None:
            return self._best(scores)[1]
        return self.router_replay.get_replay_topk(scores, self.routing_config.top_k, default_compute_topk=self._best)[1]

    def _best(self, scores: Tensor, *_: Any, **__: Any) -> Any:
        """The best experts of the best groups; Megatron's replay also passes sizes that the config already says."""
        routing = self.routing_config
        if routing.is_grouped:
            grouped = scores.view(len(scores), routing.num_groups, -1)
            best = grouped.topk(2, dim=-1)[0].sum(-1).topk(routing.top_groups, dim=-1, sorted=False)[1]
            outside = torch.ones_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, best, False)
            scores = grouped.masked_fill(outside[:, :, None], float("-inf")).flatten(1)
        # Which of equal scores are taken follows from `sorted`: as transformers has it for either kind.
        return scores.topk(routing.top_k, dim=-1, sorted=routing.score == "softmax")

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Move the expert bias with the module, but never cast it: a model in bfloat16 keeps it in float32."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self
