"""What config.json says of a decoder with multi-head latent attention, in one checked shape.

DeepSeek-V3, Kimi K2, GLM-4.7-Flash, DeepSeek-V3.2 and GLM-5 all start here, each with the defaults of its
configuration class in transformers. Values that would change the arithmetic in a way that this package does not compute
are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.moe_config import MoEConfig
from miles_train.megatron.rope import Rope, read_rope

# Norms of latent vectors: transformers builds them with its class's default, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class IndexerConfig:
    """The lightning indexer of sparse attention: which keys each query sees.

    Attributes:
        num_heads: query heads of the indexer.
        head_dim: channels of one; its first rotary channels are turned.
        top_k: keys that a query sees; all of them where it has no more.
        full_layers: layers with an indexer of their own; the others see what the nearest one before them chose.
    """

    num_heads: int
    head_dim: int
    top_k: int
    full_layers: tuple[int, ...]

    def source(self, layer: int) -> int:
        """The layer whose indexer chooses for `layer`."""
        return max(full for full in self.full_layers if full <= layer)


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """A decoder with multi-head latent attention, some layers dense and some with experts.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads.
        q_rank: channels of the queries' latent vector; None where queries are projected at once.
        kv_rank: channels of the latent vector of keys and values.
        content_dim: channels of a query or key head that are not turned.
        rotary_dim: those that are.
        value_dim: channels of a value head.
        attention_bias: whether down-projections and output projection have biases.
        rope: the rotary embedding.
        interleaved: whether the two channels of a rotary pair are neighbours.
        yarn_factor: how far the context is stretched, for the temperature of attention scores: scores are multiplied by
            (0.1 * yarn_weight * ln(yarn_factor) + 1) ** 2 (arXiv:2309.00071). Transformers does so for any scaling.
        yarn_weight: see there; 0 for no temperature.
        intermediate_size: width of the dense MLP.
        moe: the experts.
        sparse_layers: layers with experts.
        vocab_size: rows of the embedding.
        norm_eps: epsilon of the norms of the residual stream.
        tied: whether the output head is the embedding.
        max_positions: longest sequence in tokens.
        indexer: of sparse attention; None where every query sees all keys before it.
        num_extra_layers: layers stored behind the decoder's, for multi-token prediction.
        num_idle_experts: experts that are stored but that no router chooses.
        prefix: of the text model's tensors.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    q_rank: int | None
    kv_rank: int
    content_dim: int
    rotary_dim: int
    value_dim: int
    attention_bias: bool
    rope: Rope
    interleaved: bool
    yarn_factor: float
    yarn_weight: float
    intermediate_size: int
    moe: MoEConfig
    sparse_layers: tuple[int, ...]
    vocab_size: int
    norm_eps: float
    tied: bool
    max_positions: int
    indexer: IndexerConfig | None = None
    num_extra_layers: int = 0
    num_idle_experts: int = 0
    prefix: str = ""

    @property
    def extra_layers(self) -> tuple[int, ...]:
        """Numbers of the layers for multi-token prediction, as stored."""
        return tuple(range(self.num_layers, self.num_layers + self.num_extra_layers))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers without experts."""
        return tuple(layer for layer in range(self.num_layers) if layer not in self.sparse_layers)


def read_latent_config(
    values: Mapping[str, Any],
    *,
    sparse_layers: tuple[int, ...],
    indexer: IndexerConfig | None = None,
    interleaved: bool = True,
    num_stored_experts: int | None = None,
    prefix: str = "",
) -> LatentConfig:
    """Take what counts from config.json.

    Args:
        values: config.json, or its text part, in the spelling of transformers 4 or 5, over the architecture's defaults.
        sparse_layers: see `LatentConfig`, as are the next ones.
        indexer: as above.
        interleaved: as above.
        num_stored_experts: experts of a layer; None for those that the router knows.
        prefix: see `LatentConfig`.

    Raises:
        InputError: a value whose arithmetic is not implemented, or that cannot be.
        KeyError: a needed key is missing.
    """
    _check(values)
    rope = read_rope(values, values["qk_rope_head_dim"])
    factor, weight = _temperature(rope, values)
    return LatentConfig(
        hidden_size=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        q_rank=values["q_lora_rank"],
        kv_rank=values["kv_lora_rank"],
        content_dim=values["qk_nope_head_dim"],
        rotary_dim=values["qk_rope_head_dim"],
        value_dim=values["v_head_dim"],
        attention_bias=bool(values.get("attention_bias", False)),
        rope=rope,
        interleaved=interleaved,
        yarn_factor=factor,
        yarn_weight=weight,
        intermediate_size=values["intermediate_size"],
        moe=_read_moe(values),
        sparse_layers=sparse_layers,
        vocab_size=values["vocab_size"],
        norm_eps=values["rms_norm_eps"],
        tied=bool(values.get("tie_word_embeddings", False)),
        max_positions=values["max_position_embeddings"],
        indexer=indexer,
        num_extra_layers=values.get("num_nextn_predict_layers") or 0,
        num_idle_experts=_idle_experts(values, num_stored_experts),
        prefix=prefix,
    )


def with_defaults(defaults: Mapping[str, Any], config: Mapping[str, Any], **aliases: str) -> dict[str, Any]:
    """config.json over an architecture's defaults; transformers reads the key of an alias as the key it names."""
    return {**defaults, **config, **{name: config[alias] for alias, name in aliases.items() if alias in config}}


def layers_by_type(values: Mapping[str, Any], first_dense: int) -> tuple[int, ...]:
    """The layers with experts: those that `mlp_layer_types` calls sparse, or all but the first `first_dense`.

    Raises:
        InputError: another type, or too few of them.
    """
    count = values["num_hidden_layers"]
    types = values.get("mlp_layer_types")
    if types is None:
        return tuple(range(min(first_dense, count), count))
    types = check_layer_types("mlp_layer_types", types, count, ("dense", "sparse"))
    return tuple(layer for layer, kind in enumerate(types) if kind == "sparse")


def read_indexer(values: Mapping[str, Any], full_layers: tuple[int, ...]) -> IndexerConfig:
    """Take the indexer from config.json.

    Raises:
        InputError: the first layer has no indexer, queries have no latent vector to index by, or the indexer's heads
            are smaller than their rotary part.
    """
    if 0 not in full_layers:
        raise InputError("indexer_types", full_layers, "the first layer must be full", "Correct config.json.")
    if values["q_lora_rank"] is None:
        raise InputError("q_lora_rank", None, "the indexer needs the queries' latent vector", "Correct config.json.")
    head_dim, rotary = values["index_head_dim"], values["qk_rope_head_dim"]
    if head_dim < rotary:
        raise InputError("index_head_dim", head_dim, f"must be at least qk_rope_head_dim = {rotary}", "Correct it.")
    return IndexerConfig(values["index_n_heads"], head_dim, values["index_topk"], full_layers)


def check_layer_types(key: str, types: Any, count: int, known: tuple[str, ...]) -> list[str]:
    """The first `count` types of a list of layer types.

    Raises:
        InputError: a type that is not `known`, or fewer than `count`.
    """
    if len(types) < count or any(kind not in known for kind in types):
        raise InputError(
            key, types, f"must name {' or '.join(known)} for each of {count} layers", "Correct config.json."
        )
    return list(types[:count])


def _check(values: Mapping[str, Any]) -> None:
    heads = values["num_attention_heads"]
    only = {
        "hidden_act": "silu",
        "quantization_config": None,
        # Every head has its own keys and values, made from the latent vector.
        "num_key_value_heads": heads,
        # What the models' own code says beside transformers' classes, which know no alternative.
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    for key, value in only.items():
        found = values.get(key)
        if found is not None and found != value:
            raise InputError(key, found, f"only {value!r} is computed for latent attention", "Train a model without.")


def _idle_experts(values: Mapping[str, Any], stored: int | None) -> int:
    routed = values["n_routed_experts"]
    if stored is None:
        return 0
    if stored < routed:
        raise InputError("num_experts", stored, f"must be at least n_routed_experts = {routed}", "Correct config.json.")
    return stored - routed


def _temperature(rope: Rope, values: Mapping[str, Any]) -> tuple[float, float]:
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    weight = float(scaling.get("mscale_all_dim") or 0.0)
    return (rope.factor, weight) if rope.kind != "default" and weight else (1.0, 0.0)


def _read_moe(values: Mapping[str, Any]) -> MoEConfig:
    return MoEConfig(
        num_experts=values["n_routed_experts"],
        top_k=values["num_experts_per_tok"],
        expert_size=values["moe_intermediate_size"],
        score="sigmoid",
        normalize=bool(values["norm_topk_prob"]),
        scaling=float(values["routed_scaling_factor"]),
        num_groups=values["n_group"],
        top_groups=values["topk_group"],
        has_bias=True,
        router_fp32=True,
        shared_size=values["moe_intermediate_size"] * values["n_shared_experts"],
    )
