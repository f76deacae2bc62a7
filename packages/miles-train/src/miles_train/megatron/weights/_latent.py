"""The rows that decoders with multi-head latent attention share: DeepSeek-V3, Kimi K2, GLM-4.7-Flash, GLM-5.

Both transformers' saved names and those of the models' own repositories are these.
"""

from collections.abc import Collection

from miles_train.megatron.latent_config import LatentConfig
from miles_train.megatron.weights._dense import gated_mlp_rows
from miles_train.megatron.weights._moe import MoENames, moe_rows
from miles_train.megatron.weights._more import more_rows, more_ties
from miles_train.megatron.weights.table import Row, WeightTable

_LAYER = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."


def latent_table(config: LatentConfig, stored: Collection[str] = (), *, predicts_more: bool = False) -> WeightTable:
    """Rows of the decoder.

    Layers for multi-token prediction, which transformers does not have, stay outside the trainer and pass through
    export unchanged unless they are trained; so does what a directory stores beside a text model.

    Args:
        config: of the model.
        stored: names in the directory.
        predicts_more: whether layers for multi-token prediction are trained. The embedding and output head that are
            stored with each of them are then the model's own.

    Raises:
        InputError: they are to be trained, and the model has none.
    """
    prefix, hidden = config.prefix, config.hidden_size
    embedding, head = prefix + "model.embed_tokens.weight", prefix + "lm_head.weight"
    vocab, hf = (config.vocab_size, hidden), prefix + _LAYER
    dense = _dense_rows(config, hf, _MEGATRON, config.dense_layers)
    mlp = dense + _sparse_rows(config, hf, _MEGATRON, config.sparse_layers)
    rows = [
        Row((embedding,), (vocab,), "embedding.word_embeddings.weight", shard_dim=0, padded=True),
        Row((prefix + "model.norm.weight",), ((hidden,),), "decoder.final_layernorm.weight"),
        *_layer_rows(config, hf, _MEGATRON, mlp),
    ]
    tied = {head: embedding} if config.tied else {}
    if predicts_more:
        rows += _more_rows(config)
        tied |= more_ties(config.extra_layers, embedding, embedding if config.tied else head, prefix)
    if not config.tied:
        rows.append(Row((head,), (vocab,), "output_layer.weight", shard_dim=0, padded=True))
    outside = () if predicts_more else tuple(f"{prefix}model.layers.{layer}.*" for layer in config.extra_layers)
    return WeightTable(tuple(rows), config.num_layers, tied, outside + _outside(config, stored))


def _more_rows(config: LatentConfig) -> list[Row]:
    """Rows of the layers for multi-token prediction, whose MLP is as the decoder's last one."""
    mlp_rows = _sparse_rows if config.sparse_layers else _dense_rows

    def decoder_rows(hf: str, megatron: str) -> list[Row]:
        return _layer_rows(config, hf, megatron, mlp_rows(config, hf, megatron, None))

    return more_rows(config.extra_layers, config.hidden_size, decoder_rows, config.prefix)


def _layer_rows(config: LatentConfig, hf: str, megatron: str, mlp: list[Row]) -> list[Row]:
    """Rows of decoder layers, by the prefixes of their names."""
    hidden = config.hidden_size
    return [
        Row((hf + "input_layernorm.weight",), ((hidden,),), megatron + "input_layernorm.weight"),
        *_attention_rows(config, hf + "self_attn.", megatron + "self_attention."),
        *_indexer_rows(config, hf + "self_attn.indexer.", megatron + "self_attention.core_attention.indexer."),
        Row((hf + "post_attention_layernorm.weight",), ((hidden,),), megatron + "pre_mlp_layernorm.weight"),
        *mlp,
    ]


def _dense_rows(config: LatentConfig, hf: str, megatron: str, layers: tuple[int, ...] | None) -> list[Row]:
    return gated_mlp_rows(hf + "mlp.", megatron + "mlp.", config.hidden_size, config.intermediate_size, layers=layers)


def _sparse_rows(config: LatentConfig, hf: str, megatron: str, layers: tuple[int, ...] | None) -> list[Row]:
    return moe_rows(config.moe, config.hidden_size, layers, MoENames(prefix=hf + "mlp."), megatron + "mlp.")


def _attention_rows(config: LatentConfig, hf: str, megatron: str) -> list[Row]:
    hidden, heads = config.hidden_size, config.num_heads
    queries = heads * (config.content_dim + config.rotary_dim)
    key_values = heads * (config.content_dim + config.value_dim)
    latent = config.kv_rank + config.rotary_dim

    def row(name: str, shape: tuple[int, ...], parameter: str, shard_dim: int | None = None) -> Row:
        return Row((hf + name,), (shape,), megatron + parameter, shard_dim=shard_dim)

    rows = [
        row("kv_a_proj_with_mqa.weight", (latent, hidden), "linear_kv_down_proj.weight"),
        row("kv_a_layernorm.weight", (config.kv_rank,), "kv_layernorm.weight"),
        row("kv_b_proj.weight", (key_values, config.kv_rank), "linear_kv_up_proj.weight", 0),
        row("o_proj.weight", (hidden, heads * config.value_dim), "linear_proj.weight", 1),
    ]
    if config.attention_bias:
        rows += [
            row("kv_a_proj_with_mqa.bias", (latent,), "linear_kv_down_proj.bias"),
            row("o_proj.bias", (hidden,), "linear_proj.bias"),
        ]
    if config.q_rank is None:
        return [row("q_proj.weight", (queries, hidden), "linear_q_proj.weight", 0), *rows]
    if config.attention_bias:
        rows.append(row("q_a_proj.bias", (config.q_rank,), "linear_q_down_proj.bias"))
    return [
        row("q_a_proj.weight", (config.q_rank, hidden), "linear_q_down_proj.weight"),
        row("q_a_layernorm.weight", (config.q_rank,), "q_layernorm.weight"),
        row("q_b_proj.weight", (queries, config.q_rank), "linear_q_up_proj.weight", 0),
        *rows,
    ]


def _indexer_rows(config: LatentConfig, hf: str, megatron: str) -> list[Row]:
    indexer = config.indexer
    if indexer is None:
        return []
    dim, hidden = indexer.head_dim, config.hidden_size
    assert config.q_rank is not None  # checked where the config is read
    shapes = {
        "wq_b.weight": (indexer.num_heads * dim, config.q_rank),
        "wk.weight": (dim, hidden),
        "k_norm.weight": (dim,),
        "k_norm.bias": (dim,),
        "weights_proj.weight": (indexer.num_heads, hidden),
    }
    return [Row((hf + name,), (shape,), megatron + name, layers=indexer.full_layers) for name, shape in shapes.items()]


def _outside(config: LatentConfig, stored: Collection[str]) -> tuple[str, ...]:
    layers = config.prefix + "model.layers."
    experts = range(config.moe.num_experts, config.moe.num_experts + config.num_idle_experts)
    sharing = () if config.indexer is None else set(range(config.num_layers)) - set(config.indexer.full_layers)
    beside = {name.partition(".")[0] for name in stored if not name.startswith(config.prefix)}
    return (
        *(f"{layers}*.mlp.experts.{expert}.*" for expert in experts),
        *(f"{layers}{layer}.self_attn.indexer.*" for layer in sorted(sharing)),
        # Empty where there are none: transformers makes an MLP of width 0.
        *([] if config.moe.shared_size else [f"{layers}*.mlp.shared_experts.*"]),
        # Kept by old exports; the frequencies come from config.json.
        f"{layers}*.self_attn.rotary_emb.inv_freq",
        *(f"{name}.*" for name in sorted(beside)),
    )
