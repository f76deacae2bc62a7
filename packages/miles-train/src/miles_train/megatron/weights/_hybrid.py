"""The rows of decoders that mix gated DeltaNet with gated attention: Qwen3-Next, Qwen3.5 and Qwen3.6.

Names after the prefix are those that transformers saves; see each family for what else lies in its directories.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_train.megatron.hybrid_config import DeltaNetConfig, HybridConfig
from miles_train.megatron.weights._dense import gated_mlp_rows
from miles_train.megatron.weights._moe import MoENames, moe_rows
from miles_train.megatron.weights.table import Concatenated, Row, WeightTable

_MEGATRON = "decoder.layers.{layer}."


@dataclass(frozen=True, slots=True)
class GatedQKV:
    """Query with its output gate, key and value, interleaved by groups as Megatron's `linear_qkv` wants them.

    Hugging Face's q_proj holds, for each query head, the query and then the gate. Megatron wants, for each key-value
    head, all its queries, all their gates, the key, and the value (megatron/core/transformer/attention.py,
    `SelfAttention.get_query_key_value_tensors` with `output_gate`). Works for weights [.., hidden] and biases.
    """

    num_heads: int
    num_groups: int
    head_dim: int

    def sharded(self, num_shards: int) -> "GatedQKV":
        """With the heads of one rank: whole groups."""
        _check_heads("num_key_value_heads", self.num_groups, num_shards)
        return GatedQKV(self.num_heads // num_shards, self.num_groups // num_shards, self.head_dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave q [heads * 2 * head_dim, ...], k and v [groups * head_dim, ...]."""
        queries, keys, values = (part.reshape(self.num_groups, -1, self.head_dim, *part.shape[1:]) for part in parts)
        both = queries.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return torch.cat([both, keys, values], dim=1).flatten(0, 2)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Copies of q, k and v in Hugging Face's order."""
        per_group = self.num_heads // self.num_groups
        grouped = whole.view(self.num_groups, 2 * per_group + 2, self.head_dim, *whole.shape[1:])
        both, keys, values = grouped.split([2 * per_group, 1, 1], dim=1)
        queries = both.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return [part.flatten(0, 2) for part in (queries, keys, values)]


@dataclass(frozen=True, slots=True)
class InterleavedByKeyHead:
    """Qwen3-Next's two input projections of DeltaNet as Megatron's one.

    `in_proj_qkvz` holds, for each key head, the query, the key, the values of its value heads, and their gates;
    `in_proj_ba` their b and then their a. Megatron wants all queries, all keys, values, gates, b, and a
    (megatron/core/ssm/gated_delta_net/gdn.py).
    """

    delta: DeltaNetConfig

    def sharded(self, num_shards: int) -> "InterleavedByKeyHead":
        """With the heads of one rank: whole key heads, each with its value heads."""
        return InterleavedByKeyHead(sharded_delta_net(self.delta, num_shards))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Sort by kind."""
        sections = zip(parts, self._sections(), strict=True)
        grouped = [part.unflatten(0, (self.delta.key_heads, -1)).split(rows, dim=1) for part, rows in sections]
        return torch.cat([section.flatten(0, 1) for group in grouped for section in group])

    def split(self, whole: Tensor) -> list[Tensor]:
        """Copies of both projections, by key head."""
        parts, start = [], 0
        for rows in self._sections():
            lengths = [self.delta.key_heads * size for size in rows]
            sections = whole.narrow(0, start, sum(lengths)).split(lengths)
            grouped = [section.unflatten(0, (self.delta.key_heads, -1)) for section in sections]
            parts.append(torch.cat(grouped, dim=1).flatten(0, 1))
            start += sum(lengths)
        return parts

    def _sections(self) -> tuple[list[int], list[int]]:
        """Rows per key head of each section of the two projections."""
        per_key = self.delta.value_heads // self.delta.key_heads
        values = per_key * self.delta.value_dim
        return [self.delta.key_dim, self.delta.key_dim, values, values], [per_key, per_key]


@dataclass(frozen=True, slots=True)
class DeltaNetSections(Concatenated):
    """Sections of whole heads, one below the other."""

    delta: DeltaNetConfig

    def sharded(self, num_shards: int) -> "DeltaNetSections":
        """With the heads of one rank."""
        delta = sharded_delta_net(self.delta, num_shards)
        return DeltaNetSections(tuple(length // num_shards for length in self.lengths), delta)


def sharded_delta_net(delta: DeltaNetConfig, num_shards: int) -> DeltaNetConfig:
    """The heads of one tensor-parallel rank.

    Raises:
        InputError: the key heads do not divide.
    """
    _check_heads("linear_num_key_heads", delta.key_heads, num_shards)
    return DeltaNetConfig(
        delta.key_heads // num_shards,
        delta.value_heads // num_shards,
        delta.key_dim,
        delta.value_dim,
        delta.conv_width,
    )


def _check_heads(setting: str, heads: int, num_shards: int) -> None:
    if heads % num_shards:
        raise InputError(
            "train.megatron.tensor_model_parallel_size",
            num_shards,
            f"must divide {setting} = {heads}",
            "Choose a size that does.",
        )


def holds_stacked_experts(stored: Collection[str]) -> bool:
    """Whether one tensor holds all experts of a layer."""
    return any(name.endswith(".mlp.experts.gate_up_proj") for name in stored)


def hybrid_table(
    config: HybridConfig, prefix: str, *, fused_projections: bool, stacked_experts: bool, outside: tuple[str, ...]
) -> WeightTable:
    """Rows of the decoder.

    Args:
        config: of the model.
        prefix: of the decoder's names, "model." or "model.language_model.".
        fused_projections: whether DeltaNet has two input projections, interleaved by key head (Qwen3-Next), or four.
        stacked_experts: whether one tensor holds all experts of a layer.
        outside: patterns of tensors that only pass through.
    """
    dense, layer = config.dense, prefix + "layers.{layer}."
    hidden, vocab = dense.hidden_size, dense.vocab_size
    embedding = prefix + "embed_tokens.weight"
    rows = [
        Row((embedding,), ((vocab, hidden),), "embedding.word_embeddings.weight", shard_dim=0, padded=True),
        Row((prefix + "norm.weight",), ((hidden,),), "decoder.final_layernorm.weight"),
        Row((layer + "input_layernorm.weight",), ((hidden,),), _MEGATRON + "input_layernorm.weight"),
        Row((layer + "post_attention_layernorm.weight",), ((hidden,),), _MEGATRON + "pre_mlp_layernorm.weight"),
    ]
    if config.full_layers:
        rows += _attention_rows(config, layer + "self_attn.")
    if config.linear_layers:
        rows += _delta_net_rows(config, layer + "linear_attn.", fused_projections)
    if config.dense_layers:
        width, layers = dense.intermediate_size, config.dense_layers
        rows += gated_mlp_rows(layer + "mlp.", _MEGATRON + "mlp.", hidden, width, layers=layers)
    if config.moe is not None:
        names = MoENames(prefix=layer + "mlp.", shared="shared_expert.", stacked=stacked_experts)
        rows += moe_rows(config.moe, hidden, config.moe_layers, names)
    if dense.tied:
        return WeightTable(tuple(rows), dense.num_layers, {"lm_head.weight": embedding}, outside)
    rows.append(Row(("lm_head.weight",), ((vocab, hidden),), "output_layer.weight", shard_dim=0, padded=True))
    return WeightTable(tuple(rows), dense.num_layers, outside=outside)


def _attention_rows(config: HybridConfig, hf: str) -> list[Row]:
    dense, layers, megatron = config.dense, config.full_layers, _MEGATRON + "self_attention."
    hidden, dim = dense.hidden_size, dense.head_dim
    sizes = (2 * dense.num_heads * dim, dense.num_groups * dim, dense.num_groups * dim)
    fusion = GatedQKV(dense.num_heads, dense.num_groups, dim)
    output = ((hidden, dense.num_heads * dim),)

    def qkv(kind: str, *trailing: int) -> Row:
        names = tuple(f"{hf}{part}_proj.{kind}" for part in "qkv")
        shapes = tuple((size, *trailing) for size in sizes)
        return Row(names, shapes, f"{megatron}linear_qkv.{kind}", fusion, shard_dim=0, layers=layers)

    rows = [
        qkv("weight", hidden),
        Row((hf + "o_proj.weight",), output, megatron + "linear_proj.weight", shard_dim=1, layers=layers),
        Row((hf + "q_norm.weight",), ((dim,),), megatron + "q_layernorm.weight", layers=layers),
        Row((hf + "k_norm.weight",), ((dim,),), megatron + "k_layernorm.weight", layers=layers),
    ]
    if dense.qkv_bias:
        rows += [qkv("bias"), Row((hf + "o_proj.bias",), ((hidden,),), megatron + "linear_proj.bias", layers=layers)]
    return rows


def _delta_net_rows(config: HybridConfig, hf: str, fused_projections: bool) -> list[Row]:
    delta, layers, megatron = config.delta, config.linear_layers, _MEGATRON + "self_attention."
    hidden = config.dense.hidden_size
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    convolved, heads = (keys, keys, values), delta.value_heads
    if fused_projections:
        names = (hf + "in_proj_qkvz.weight", hf + "in_proj_ba.weight")
        shapes = ((sum(convolved) + values, hidden), (2 * heads, hidden))
        fusion, starts = InterleavedByKeyHead(delta), None
    else:
        lengths = (*convolved, values, heads, heads)
        names = tuple(f"{hf}in_proj_{part}.weight" for part in ("qkv", "qkv", "qkv", "z", "b", "a"))
        shapes = tuple((length, hidden) for length in lengths)
        fusion, starts = DeltaNetSections(lengths, delta), (0, keys, 2 * keys, 0, 0, 0)
    return [
        Row(names, shapes, megatron + "in_proj.weight", fusion, shard_dim=0, layers=layers, starts=starts),
        Row(
            (hf + "conv1d.weight",) * 3,
            tuple((length, 1, delta.conv_width) for length in convolved),
            megatron + "conv1d.weight",
            DeltaNetSections(convolved, delta),
            shard_dim=0,
            layers=layers,
            starts=(0, keys, 2 * keys),
        ),
        *(
            Row((hf + name,), ((heads,),), megatron + name, shard_dim=0, layers=layers, fp32=True)
            for name in ("A_log", "dt_bias")
        ),
        Row((hf + "norm.weight",), ((delta.value_dim,),), megatron + "out_norm.weight", layers=layers),
        Row((hf + "out_proj.weight",), ((hidden, values),), megatron + "out_proj.weight", shard_dim=1, layers=layers),
    ]
