"""Our router beside transformers' and under Megatron's replay, in a rank's process."""

from types import SimpleNamespace

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from miles_train.megatron import cpu_shim
from miles_train.megatron.moe_config import MoEConfig
from miles_train.megatron.specs._moe import Router, moe_arguments
from miles_train.megatron.upstream import TransformerConfig

GROUPS = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)


def make_router(routing, **more):
    arguments = moe_arguments(routing)
    arguments["num_moe_experts"] = arguments.pop("num_experts")
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **arguments, **more)
    cpu_shim.install()
    with cpu_shim.active():
        return Router(config, routing=routing, pg_collection=GROUPS)


def check_routes(_, cases, ties):
    """Ours are theirs, for random routers of each case; with ties, many scores are equal."""
    for values in cases:
        for seed in range(3):
            torch.manual_seed(seed)
            _check_route(MoEConfig(expert_size=4, **values), ties)


def _check_route(routing, ties):
    logits = torch.randn(50, 1, routing.num_experts)
    bias = torch.randn(routing.num_experts)
    if ties:
        logits, bias = logits.round(), bias.round()
    router = make_router(routing)
    if routing.has_bias:
        router.expert_bias.copy_(bias)
    ours, chosen = router.routing(logits)
    assert (chosen.sum(-1) == routing.top_k).all()
    weights, experts = _theirs(routing, logits[:, 0], bias)
    theirs = torch.zeros_like(ours).scatter(1, experts, weights)
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, experts, True)), routing
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _theirs(routing, logits, bias):
    if routing.score == "softmax":
        config = SimpleNamespace(
            num_experts_per_tok=routing.top_k,
            num_experts=routing.num_experts,
            norm_topk_prob=routing.normalize,
            hidden_size=routing.num_experts,
        )
        router = Qwen3MoeTopKRouter(config)
        router.weight.data = torch.eye(routing.num_experts)
        return router(logits)[1:]
    block = SimpleNamespace(
        gate=SimpleNamespace(e_score_correction_bias=bias if routing.has_bias else torch.zeros_like(bias)),
        n_group=routing.num_groups,
        topk_group=routing.top_groups,
        n_routed_experts=routing.num_experts,
        top_k=routing.top_k,
        norm_topk_prob=routing.normalize,
        routed_scaling_factor=routing.scaling,
    )
    experts, weights = Glm4MoeMoE.route_tokens_to_experts(block, logits)
    return weights, experts


def check_replay(_):
    """Recorded choices can be replayed; weights and gradients are then those of the replayed experts."""
    routing = MoEConfig(6, 2, 4, score="sigmoid", has_bias=True, num_groups=3, top_groups=2)
    router = make_router(routing, moe_enable_routing_replay=True)
    logits = torch.randn(5, 2, 6, requires_grad=True)
    router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)
    _, chosen = router.routing(logits)
    recorded = router.router_replay.get_recorded_indices()
    assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, recorded, True))
    others = torch.tensor([[0, 5]]).expand(10, 2)
    router.router_replay.set_target_indices(others)
    router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    weights, chosen = router.routing(logits)
    assert chosen[:, [0, 5]].all() and chosen.sum() == 20
    scores = logits.detach().view(-1, 6).sigmoid()[:, [0, 5]]
    torch.testing.assert_close(weights[:, [0, 5]], scores / scores.sum(-1, keepdim=True))
    weights[:, 0].sum().backward()
    assert logits.grad[..., [0, 5]].abs().min() > 0 and not logits.grad[..., 1:5].any()
    RouterReplay.clear_global_router_replay_instances()


def check_bias_stays(_):
    """A model cast to bfloat16 keeps the bias's bits."""
    router = make_router(MoEConfig(6, 2, 4, score="sigmoid", has_bias=True))
    router.expert_bias.copy_(torch.randn(6))
    before = router.expert_bias.clone()
    router = router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, before)
    assert "expert_bias" in router.state_dict()
