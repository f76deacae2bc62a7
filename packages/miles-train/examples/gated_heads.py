"""A family of one's own: a decoder whose attention heads have gates, and slopes (ALiBi) instead of rotary embedding.

    [model]
    path = "models/mine"                     # config.json names "GatedHeadsForCausalLM", whatever transformers knows
    family = "gated_heads:FAMILY"            # this file, in the folder of the command or on PYTHONPATH

What is written here is what is new: the attention block, an ordinary torch module; which Megatron model it is part of;
and which stored tensors its parameters are. Loading, export, checkpoints, weight sync and every layout of ranks but
context parallelism follow from these.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_train.megatron.families import Family
from miles_train.megatron.specs import Spec
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.specs.layers import decoder_layer
from miles_train.megatron.upstream import (
    MegatronModule,
    ModuleSpec,
    TransformerConfig,
    get_mlp_module_spec_for_backend,
    parallel_state,
)
from miles_train.megatron.weights import GroupedQKV, Row, Stacked, WeightTable

Config = Mapping[str, Any]


class GatedHeads(MegatronModule):
    """Causal attention: scores fall with distance (Press et al. 2022, arXiv:2108.12409), outputs are gated per head.

    `MegatronModule` is `torch.nn.Module` and what saves a rank's part of a checkpoint. The linears are Megatron's,
    which divide their rows (heads) or columns over tensor-parallel ranks; beside them only the slopes know of ranks.

    Query, key and value of one head lie together in `linear_qkv` (`GroupedQKV`): a checkpoint puts the rows of ranks
    one below the other, and whole heads are then in order in any layout. All queries before all keys would not be.
    """

    supports_packing = False  # distances are counted over the whole row

    def __init__(self, config: TransformerConfig, column: Any, row: Any, **_: Any):
        """Build it as Megatron builds self-attention, from the backend's linears."""
        super().__init__(config=config)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        heads, self.head_dim = config.num_attention_heads, config.kv_channels
        self.num_heads = heads // ranks
        slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1))
        self.slopes = slopes.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        width, hidden = heads * self.head_dim, config.hidden_size
        common = {"config": config, "init_method": config.init_method, "bias": False, "skip_bias_add": False}
        self.linear_qkv = column(hidden, 3 * width, gather_output=False, is_expert=False, **common)
        self.linear_gate = column(hidden, heads, gather_output=False, is_expert=False, **common)
        self.linear_proj = row(width, hidden, input_is_parallel=True, is_expert=False, **common)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """Attend from [S, B, hidden]; output and bias, which there is not."""
        qkv, _no_bias = self.linear_qkv(hidden_states)
        gate, _no_bias = self.linear_gate(hidden_states)
        heads = qkv.unflatten(-1, (self.num_heads, 3 * self.head_dim)).permute(1, 2, 0, 3)  # [B, heads, S, 3 head_dim]
        query, key, value = heads.chunk(3, dim=-1)
        position = torch.arange(len(qkv), device=qkv.device)
        distance = position[:, None] - position  # [S, S]
        bias = (-self.slopes.to(qkv)[:, None, None] * distance).masked_fill(distance < 0, float("-inf"))
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        context = context.permute(2, 0, 1, 3) * gate.sigmoid().unsqueeze(-1)  # [S, B, heads, head_dim]
        return self.linear_proj(context.flatten(2))


def arguments(config: Config) -> dict[str, Any]:
    """Megatron's arguments."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": _head_dim(config),
        "max_position_embeddings": config["max_position_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "layernorm_epsilon": config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "none",
        "untie_embeddings_and_output_weights": True,
    }


def layers(config: Config, transformer: TransformerConfig, backend: BackendSpecProvider) -> list[ModuleSpec]:
    """The same layer for each."""
    if transformer.context_parallel_size > 1:
        size, rule = transformer.context_parallel_size, "must be 1: every token looks at the whole sequence"
        raise InputError("train.megatron.context_parallel_size", size, rule, "Remove the key.")
    linears = {"column": backend.column_parallel_linear(), "row": backend.row_parallel_linear()}
    attention = ModuleSpec(module=GatedHeads, params=linears)
    layer = decoder_layer(attention, get_mlp_module_spec_for_backend(backend), backend)
    return [layer] * transformer.num_layers


def table(config: Config, stored: Collection[str]) -> WeightTable:
    """Which tensors of the directory are which parameters, and along which dim ranks divide them."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    width = heads * _head_dim(config)
    hf, ours = "model.layers.{layer}.", "decoder.layers.{layer}."
    qkv = tuple(f"{hf}self_attn.{part}_proj.weight" for part in "qkv")
    embedding = "model.embed_tokens.weight"
    gate, output = hf + "self_attn.gate_proj.weight", hf + "self_attn.o_proj.weight"
    rows = (
        Row((embedding,), ((vocab, hidden),), "embedding.word_embeddings.weight", shard_dim=0, padded=True),
        Row(
            qkv,
            ((width, hidden),) * 3,
            ours + "self_attention.linear_qkv.weight",
            GroupedQKV(heads, heads, width // heads),
            shard_dim=0,
        ),
        Row((gate,), ((heads, hidden),), ours + "self_attention.linear_gate.weight", shard_dim=0),
        Row((output,), ((hidden, width),), ours + "self_attention.linear_proj.weight", shard_dim=1),
        Row(
            (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"),
            ((mlp, hidden),) * 2,
            ours + "mlp.linear_fc1.weight",
            Stacked(2),
            shard_dim=0,
        ),
        Row((hf + "mlp.down_proj.weight",), ((hidden, mlp),), ours + "mlp.linear_fc2.weight", shard_dim=1),
        Row((hf + "input_layernorm.weight",), ((hidden,),), ours + "input_layernorm.weight"),
        Row((hf + "post_attention_layernorm.weight",), ((hidden,),), ours + "pre_mlp_layernorm.weight"),
        Row(("model.norm.weight",), ((hidden,),), "decoder.final_layernorm.weight"),
        Row(("lm_head.weight",), ((vocab, hidden),), "output_layer.weight", shard_dim=0, padded=True),
    )  # fmt: skip
    return WeightTable(rows, config["num_hidden_layers"])


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


FAMILY = Family(table=table, spec=Spec(arguments=arguments, layers=layers))
