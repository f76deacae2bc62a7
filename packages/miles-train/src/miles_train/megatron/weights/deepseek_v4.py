"""Weights of DeepseekV4ForCausalLM.

Two spellings are read, and written as they were read: what transformers 5.12 saves (`model.layers.0.self_attn...`, with
`head.weight` and experts `w1`, `w2`, `w3`), and the flat one of the published checkpoints (`layers.0.attn.wq_a...`) as
transformers/conversion_mapping.py lists it. Layers of multi-token prediction (`mtp.*`), which transformers drops, pass
through export unchanged.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from miles_train.megatron.deepseek_v4_config import HEAVY, SPARSE, V4Config, read_config
from miles_train.megatron.weights._moe import MoENames, moe_rows
from miles_train.megatron.weights.table import Row, Shape, WeightTable

_HF, _MEGATRON = "model.layers.{layer}.", "decoder.layers.{layer}."
_EXPERT = (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))
# From transformers' names of modules to the published names, in this order.
_PUBLISHED = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.", ".ffn."),
    (r"\.self_attn\.sinks", ".attn.attn_sink"),
    (r"\.self_attn\.", ".attn."),
    (r"\.compressor\.indexer\.scorer\.", ".indexer."),
    (r"\.compressor\.indexer\.q_b_proj", ".indexer.q_b_proj"),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"compressor\.kv_norm", "compressor.norm"),
    (r"compressor\.position_bias", "compressor.ape"),
    (r"compressor\.gate_proj", "compressor.wgate"),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.(attn|indexer|compressor)\.(q|o)_([ab])_proj", r".\1.w\2_\3"),
    (r"\.(attn|indexer|compressor)\.kv_proj", r".\1.wkv"),
    (r"\.gate\.e_score_correction_bias", ".gate.bias"),
    *((rf"\.shared_experts\.{name}\.", f".shared_experts.{short}.") for name, short in _EXPERT),
)


def table(config: Mapping[str, Any], stored: Collection[str] = ()) -> WeightTable:
    """Rows for config.json, spelled as the stored names are."""
    v4 = read_config(config)
    rows = [*_outer_rows(v4), *_attention_rows(v4), *_stream_rows(v4), *_moe_rows(v4)]
    spell = _published if "embed.weight" in stored else _saved
    rows = [replace(row, hf=tuple(map(spell, row.hf))) for row in rows]
    tied = {"head.weight": spell("model.embed_tokens.weight")} if v4.tied else {}
    return WeightTable(tuple(rows), v4.num_layers, tied, outside=("mtp.*", "model.mtp.*"))


def _saved(name: str) -> str:
    """What transformers saves a tensor as, from its module's name."""
    for long, short in _EXPERT:
        name = name.replace("experts.{expert}." + long, "experts.{expert}." + short)
    return name.replace("lm_head.", "head.")


def _published(name: str) -> str:
    """What the published checkpoints call it."""
    name = _saved(name)
    for pattern, replacement in _PUBLISHED:
        name = re.sub(pattern, replacement, name)
    return name


def _outer_rows(v4: V4Config) -> list[Row]:
    n, hidden, vocab = v4.num_streams, v4.hidden_size, v4.vocab_size
    last = f"decoder.layers.{v4.num_layers - 1}.hc_head."
    rows = [
        Row(
            ("model.embed_tokens.weight",),
            ((vocab, hidden),),
            "embedding.word_embeddings.weight",
            shard_dim=0,
            padded=True,
        ),
        Row(("model.norm.weight",), ((hidden,),), "decoder.final_layernorm.weight"),
    ]
    shapes: dict[str, Shape] = {"fn": (n, n * hidden), "base": (n,), "scale": (1,)}
    rows += [Row((f"model.hc_head.hc_{part}",), (shape,), last + part, fp32=True) for part, shape in shapes.items()]
    if not v4.tied:
        rows.append(Row(("lm_head.weight",), ((vocab, hidden),), "output_layer.weight", shard_dim=0, padded=True))
    return rows


def _attention_rows(v4: V4Config) -> list[Row]:
    hidden, wide = v4.hidden_size, v4.num_heads * v4.head_dim
    hf, megatron = _HF + "self_attn.", _MEGATRON + "self_attention."
    groups, per_group = v4.num_groups * v4.group_rank, wide // v4.num_groups
    rows = [
        _same(hf, megatron, "q_a_proj.weight", (v4.q_rank, hidden)),
        _same(hf, megatron, "q_a_norm.weight", (v4.q_rank,)),
        _same(hf, megatron, "kv_proj.weight", (v4.head_dim, hidden)),
        _same(hf, megatron, "kv_norm.weight", (v4.head_dim,)),
        Row((hf + "q_b_proj.weight",), ((wide, v4.q_rank),), megatron + "q_b_proj", shard_dim=0),
        Row((hf + "o_a_proj.weight",), ((groups, per_group),), megatron + "o_a_proj", shard_dim=0),
        Row((hf + "o_b_proj.weight",), ((hidden, groups),), megatron + "o_b_proj", shard_dim=1),
        Row((hf + "sinks",), ((v4.num_heads,),), megatron + "sinks", shard_dim=0, fp32=True),
    ]
    for kind, rate, width in ((SPARSE, v4.sparse_rate, 2 * v4.head_dim), (HEAVY, v4.heavy_rate, v4.head_dim)):
        layers = v4.layers_with(kind)
        rows += _compressor_rows(hf + "compressor.", megatron + "compressor.", v4, rate, width, v4.head_dim, layers)
    return [row for row in (*rows, *_indexer_rows(v4)) if row.layers != ()]


def _indexer_rows(v4: V4Config) -> list[Row]:
    layers = v4.layers_with(SPARSE)
    hf, megatron = _HF + "self_attn.compressor.indexer.", _MEGATRON + "self_attention.indexer."
    queries: Shape = (v4.index_heads * v4.index_dim, v4.q_rank)
    weights: Shape = (v4.index_heads, v4.hidden_size)
    return [
        *_compressor_rows(hf, megatron + "compressor.", v4, v4.sparse_rate, 2 * v4.index_dim, v4.index_dim, layers),
        _same(hf, megatron, "q_b_proj.weight", queries, layers),
        Row((hf + "scorer.weights_proj.weight",), (weights,), megatron + "weights_proj.weight", layers=layers),
    ]


def _compressor_rows(
    hf: str, megatron: str, v4: V4Config, rate: int, width: int, dim: int, layers: tuple[int, ...]
) -> list[Row]:
    return [
        _same(hf, megatron, "kv_proj.weight", (width, v4.hidden_size), layers),
        _same(hf, megatron, "gate_proj.weight", (width, v4.hidden_size), layers),
        _same(hf, megatron, "kv_norm.weight", (dim,), layers),
        replace(_same(hf, megatron, "position_bias", (rate, width), layers), fp32=True),
    ]


def _stream_rows(v4: V4Config) -> list[Row]:
    n = v4.num_streams
    mix = (2 + n) * n
    shapes: dict[str, Shape] = {"fn": (mix, n * v4.hidden_size), "base": (mix,), "scale": (3,)}
    rows = [
        replace(_same(_HF, _MEGATRON, f"{place}_hc.{part}", shape), fp32=True)
        for place in ("attn", "ffn")
        for part, shape in shapes.items()
    ]
    norms = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
    rows += [
        Row((f"{_HF}{name}.weight",), ((v4.hidden_size,),), f"{_MEGATRON}{ours}.weight") for name, ours in norms.items()
    ]
    return rows


def _moe_rows(v4: V4Config) -> list[Row]:
    learned = tuple(layer for layer, hashed in enumerate(v4.is_hashed) if not hashed)
    hashed = tuple(layer for layer, hashed in enumerate(v4.is_hashed) if hashed)
    rows = moe_rows(replace(v4.moe, has_bias=False), v4.hidden_size, names=MoENames())
    bias = _HF + "mlp.gate.e_score_correction_bias", _MEGATRON + "mlp.router.expert_bias"
    table = _HF + "mlp.gate.tid2eid", _MEGATRON + "mlp.router.tid2eid"
    shapes: tuple[Shape, Shape] = (v4.moe.num_experts,), (v4.vocab_size, v4.moe.top_k)
    rows.append(Row((bias[0],), (shapes[0],), bias[1], layers=learned, fp32=True))
    rows.append(Row((table[0],), (shapes[1],), table[1], layers=hashed))
    return [row for row in rows if row.layers != ()]


def _same(hf: str, megatron: str, name: str, shape: Shape, layers: tuple[int, ...] | None = None) -> Row:
    """A parameter that both sides call the same."""
    return Row((hf + name,), (shape,), megatron + name, layers=layers)
