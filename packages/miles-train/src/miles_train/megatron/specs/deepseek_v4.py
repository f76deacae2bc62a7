"""DeepseekV4ForCausalLM in Megatron: hyper-connections, compressed attention and hashed experts are modules of ours."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from miles_core.errors import InputError
from miles_train.megatron.deepseek_v4_config import V4Config, read_config
from miles_train.megatron.moe_config import MoEConfig
from miles_train.megatron.specs._moe import Router, moe_arguments, moe_mlp
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.specs.compressed_attention import CompressedAttention
from miles_train.megatron.specs.hyper_connections import HyperConnection, HyperHead, expand
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.upstream import (
    GPTModel,
    ModuleSpec,
    TransformerConfig,
    TransformerLayer,
    make_viewless_tensor,
    parallel_state,
)


class TokenIds:
    """The tokens of the micro-batch that runs, where layers that route by them can find them."""

    tokens: Tensor | None = None  # [B, S]


class HashRouter(Router):
    """Sends a token where a fixed table says; its state only weighs them (Roller et al. 2021, arXiv:2106.04426)."""

    def __init__(self, config: TransformerConfig, *, routing: MoEConfig, vocab_size: int, **kwargs: Any):
        """Build it as Megatron builds routers.

        Args:
            config: of the model.
            routing: as for `Router`.
            vocab_size: rows of the table.
            kwargs: as for `Router`.
        """
        super().__init__(config, routing=routing, **kwargs)
        self.register_buffer("tid2eid", torch.zeros(vocab_size, routing.top_k, dtype=torch.int64))
        del self.expert_bias
        self.expert_bias = None  # a table needs none
        self.token_ids = TokenIds()

    def _choose(self, scores: Tensor) -> Tensor:
        tokens = self.token_ids.tokens
        assert tokens is not None
        flat = tokens.t().reshape(-1)
        if self.config.sequence_parallel:
            flat = flat.chunk(parallel_state.get_tensor_model_parallel_world_size())[
                parallel_state.get_tensor_model_parallel_rank()
            ]
        table: Any = self.tid2eid
        return table[flat]


class HyperLayer(TransformerLayer):
    """A decoder layer between hyper-connections.

    Between layers the streams travel side by side, [S, B, n D]. The first layer makes them of the embedding, the last
    one makes one of them.
    """

    def __init__(self, config: TransformerConfig, *args: Any, v4: V4Config, **kwargs: Any):
        """Build it as Megatron builds layers; `v4` is of the model."""
        super().__init__(config, *args, **kwargs)
        self.num_streams = v4.num_streams
        streams = v4.num_streams, v4.sinkhorn_iters, v4.stream_eps
        self.attn_hc, self.ffn_hc = HyperConnection(config, *streams), HyperConnection(config, *streams)
        self.hc_head = None
        if self.layer_number == v4.num_layers:
            self.hc_head = HyperHead(config, v4.num_streams, v4.stream_eps)

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: [S, B, n D]; [S, B, D] for the first layer.
            kwargs: what Megatron hands a layer; `packed_seq_params` is read.

        Returns:
            [S, B, n D]; [S, B, D] from the last layer. And no context.
        """
        streams = hidden_states.unflatten(-1, (-1, self.config.hidden_size))
        if self.layer_number == 1:
            streams = streams.expand(-1, -1, self.num_streams, -1)
        packed = kwargs.get("packed_seq_params")
        parts: Any = self  # Megatron annotates submodules by protocols that cannot be called
        x, post, comb = self.attn_hc(streams)
        output, _bias = parts.self_attention(parts.input_layernorm(x), attention_mask=None, packed_seq_params=packed)
        streams = expand(output, streams, post, comb)
        x, post, comb = self.ffn_hc(streams)
        output, _bias = parts.mlp(parts.pre_mlp_layernorm(x))
        streams = expand(output, streams, post, comb)
        output = streams.flatten(2) if self.hc_head is None else self.hc_head(streams)
        # A pipeline stage frees what it has sent on, which a view would keep.
        return make_viewless_tensor(inp=output, requires_grad=output.requires_grad, keep_graph=True), None


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    v4 = read_config(config)
    return {
        "num_layers": v4.num_layers,
        "hidden_size": v4.hidden_size,
        "ffn_hidden_size": v4.moe.expert_size,
        "num_attention_heads": v4.num_heads,
        "kv_channels": v4.head_dim,
        "max_position_embeddings": v4.max_positions,
        "seq_length": v4.max_positions,
        "vocab_size": v4.vocab_size,
        "layernorm_epsilon": v4.norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "activation_func_clamp_value": v4.clamp,
        "add_bias_linear": False,
        "position_embedding_type": "none",
        "untie_embeddings_and_output_weights": not v4.tied,
        **moe_arguments(v4.moe),
    }


def _layers(
    config: Mapping[str, Any], transformer: TransformerConfig, backend: BackendSpecProvider
) -> list[ModuleSpec]:
    v4 = read_config(config)
    _check_layout(v4, transformer)
    attention = ModuleSpec(module=CompressedAttention, params={"v4": v4})
    learned = moe_mlp(v4.moe, transformer, backend)
    hashed = moe_mlp(v4.moe, transformer, backend, router=partial(HashRouter, vocab_size=v4.vocab_size))
    layers = []
    for is_hashed in v4.is_hashed:
        layer = decoder_layer(attention, hashed if is_hashed else learned, backend)
        layers.append(ModuleSpec(module=HyperLayer, params={"v4": v4}, submodules=layer.submodules))
    return layers


def _check_layout(v4: V4Config, transformer: TransformerConfig) -> None:
    ranks, context = transformer.tensor_model_parallel_size, transformer.context_parallel_size
    for setting, value, holds, rule in (
        ("tensor_model_parallel_size", ranks, v4.num_groups % ranks == 0, f"must divide o_groups = {v4.num_groups}"),
        ("context_parallel_size", context, context == 1, "must be 1"),
        (
            "recompute_granularity",
            transformer.recompute_granularity,
            transformer.recompute_granularity != "full" or not any(v4.is_hashed),
            "would route recomputed tokens of one micro-batch by the ids of another",
        ),
    ):
        if not holds:
            raise InputError(f"train.megatron.{setting}", value, f"{rule} for DeepSeek-V4", "Change or remove the key.")


def _show_tokens(model: GPTModel, config: Mapping[str, Any]) -> None:
    """Let hashing routers see the tokens of each forward pass."""
    shared = TokenIds()
    for module in model.modules():
        if isinstance(module, HashRouter):
            module.token_ids = shared

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shared.tokens = args[0] if args else kwargs["input_ids"]

    model.register_forward_pre_hook(note, with_kwargs=True)


SPEC = Spec(arguments=_arguments, layers=_layers, finish=_show_tokens)
