"""The rows that dense decoders of the Llama line share: Llama, SmolLM2, Qwen3."""

from miles_train.megatron.dense_config import DenseConfig
from miles_train.megatron.weights.table import GroupedQKV, Row, Stacked, WeightTable

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def dense_table(config: DenseConfig) -> WeightTable:
    """Rows of a decoder with grouped-query attention and a gated MLP."""
    hidden, width, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, groups, dim = config.num_heads, config.num_groups, config.head_dim
    fusion = GroupedQKV(heads, groups, dim)
    qkv = tuple(_HF + f"self_attn.{part}_proj" for part in "qkv")
    gate_up = tuple(_HF + f"mlp.{part}_proj" for part in ("gate", "up"))
    sizes = (heads * dim, groups * dim, groups * dim)
    embedding = "model.embed_tokens.weight"
    rows = [
        Row((embedding,), ((vocab, hidden),), "embedding.word_embeddings.weight", shard_dim=0, padded=True),
        Row(("model.norm.weight",), ((hidden,),), "decoder.final_layernorm.weight"),
        Row((_HF + "input_layernorm.weight",), ((hidden,),), _MEGATRON + "input_layernorm.weight"),
        Row(
            _suffixed(qkv, "weight"),
            tuple((size, hidden) for size in sizes),
            _MEGATRON + "self_attention.linear_qkv.weight",
            fusion,
            shard_dim=0,
        ),
        Row(
            (_HF + "self_attn.o_proj.weight",),
            ((hidden, heads * dim),),
            _MEGATRON + "self_attention.linear_proj.weight",
            shard_dim=1,
        ),
        Row(
            (_HF + "post_attention_layernorm.weight",),
            ((hidden,),),
            _MEGATRON + "pre_mlp_layernorm.weight",
        ),
        Row(
            _suffixed(gate_up, "weight"),
            ((width, hidden),) * 2,
            _MEGATRON + "mlp.linear_fc1.weight",
            Stacked(2),
            shard_dim=0,
        ),
        Row(
            (_HF + "mlp.down_proj.weight",),
            ((hidden, width),),
            _MEGATRON + "mlp.linear_fc2.weight",
            shard_dim=1,
        ),
    ]
    if config.qk_norm:
        rows += [
            Row(
                (_HF + f"self_attn.{part}_norm.weight",),
                ((dim,),),
                _MEGATRON + f"self_attention.{part}_layernorm.weight",
            )
            for part in "qk"
        ]
    if config.attention_bias:
        rows += [
            Row(
                _suffixed(qkv, "bias"),
                tuple((size,) for size in sizes),
                _MEGATRON + "self_attention.linear_qkv.bias",
                fusion,
                shard_dim=0,
            ),
            Row(
                (_HF + "self_attn.o_proj.bias",),
                ((hidden,),),
                _MEGATRON + "self_attention.linear_proj.bias",
            ),
        ]
    if config.mlp_bias:
        rows += [
            Row(
                _suffixed(gate_up, "bias"),
                ((width,),) * 2,
                _MEGATRON + "mlp.linear_fc1.bias",
                Stacked(2),
                shard_dim=0,
            ),
            Row((_HF + "mlp.down_proj.bias",), ((hidden,),), _MEGATRON + "mlp.linear_fc2.bias"),
        ]
    if config.tied:
        return WeightTable(tuple(rows), config.num_layers, {"lm_head.weight": embedding})
    head = Row(("lm_head.weight",), ((vocab, hidden),), "output_layer.weight", shard_dim=0, padded=True)
    return WeightTable((*rows, head), config.num_layers)


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}.{suffix}" for name in names)
