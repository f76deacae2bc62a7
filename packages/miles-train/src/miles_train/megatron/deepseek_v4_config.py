"""What config.json says of a DeepSeek-V4, in one checked shape (transformers 5.12, configuration_deepseek_v4.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.moe_config import MoEConfig
from miles_train.megatron.rope import Rope, read_rope

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_RATIOS = {0: SLIDING, 4: SPARSE, 128: HEAVY}  # `compress_ratios`, an older spelling of layer_types


@dataclass(frozen=True, slots=True)
class V4Config:
    """A DeepSeek-V4 decoder.

    Attributes:
        hidden_size: width of one residual stream.
        num_layers: decoder layers.
        num_streams: residual streams that hyper-connections mix.
        sinkhorn_iters: normalisations of the stream mixer, at least 1.
        stream_eps: added where the mixer divides and to its weights.
        num_heads: query heads, all on one key-value head.
        head_dim: channels of a head, of which the last rotate.
        q_rank: width between the two query projections.
        num_groups: groups of heads in the output projection.
        group_rank: width of each group between the two output projections.
        window: tokens that a query sees directly, itself included.
        attention: SLIDING, SPARSE or HEAVY for each layer.
        is_hashed: for each layer whether a token's id, not its state, chooses the experts.
        sparse_rate: tokens that make one compressed entry of SPARSE layers.
        heavy_rate: the same of HEAVY layers.
        index_heads: heads of the indexer of SPARSE layers.
        index_dim: channels of one of them.
        index_top_k: compressed entries that a query keeps.
        moe: the experts.
        clamp: bound on the inputs of the experts' gated activation.
        vocab_size: rows of the embedding.
        norm_eps: epsilon of every RMSNorm.
        tied: whether the output head is the embedding.
        max_positions: longest sequence in tokens.
        main_rope: of SLIDING layers.
        compress_rope: of the others.
    """

    hidden_size: int
    num_layers: int
    num_streams: int
    sinkhorn_iters: int
    stream_eps: float
    num_heads: int
    head_dim: int
    q_rank: int
    num_groups: int
    group_rank: int
    window: int
    attention: tuple[str, ...]
    is_hashed: tuple[bool, ...]
    sparse_rate: int
    heavy_rate: int
    index_heads: int
    index_dim: int
    index_top_k: int
    moe: MoEConfig
    clamp: float
    vocab_size: int
    norm_eps: float
    tied: bool
    max_positions: int
    main_rope: Rope
    compress_rope: Rope

    def rope(self, layer: int) -> Rope:
        """The rotary embedding of a layer, counted from 0."""
        return self.main_rope if self.attention[layer] == SLIDING else self.compress_rope

    def layers_with(self, kind: str) -> tuple[int, ...]:
        """The layers of one kind of attention."""
        return tuple(layer for layer, found in enumerate(self.attention) if found == kind)


def read_config(config: Mapping[str, Any]) -> V4Config:
    """Take what counts from config.json.

    What transformers reads nowhere is not looked at: num_key_value_heads (it is 1), n_shared_experts (one, as wide as
    a routed one), norm_topk_prob (weights are always divided by their sum), attention_bias, router_jitter_noise,
    n_group, topk_group.

    Raises:
        InputError: a value whose arithmetic is not implemented, or sizes that do not fit.
        KeyError: a needed key is missing.
    """
    _refuse(config, "hidden_act", "silu")
    _refuse(config, "mlp_bias", False)
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim, groups = config["head_dim"], config.get("o_groups", 8)
    if heads % groups:
        raise InputError("o_groups", groups, f"must divide num_attention_heads = {heads}", "Save the config again.")
    rates = _rates(config)
    main, compress = _ropes(config, head_dim)
    width = config["moe_intermediate_size"]
    return V4Config(
        hidden_size=config["hidden_size"],
        num_layers=layers,
        num_streams=config.get("hc_mult", 4),
        sinkhorn_iters=config.get("hc_sinkhorn_iters", 20),
        stream_eps=config.get("hc_eps", 1e-6),
        num_heads=heads,
        head_dim=head_dim,
        q_rank=config["q_lora_rank"],
        num_groups=groups,
        group_rank=config.get("o_lora_rank", 1024),
        window=config.get("sliding_window", 128),
        attention=_attention_kinds(config, layers),
        is_hashed=_hashed(config, layers),
        sparse_rate=rates[SPARSE],
        heavy_rate=rates[HEAVY],
        index_heads=config.get("index_n_heads", 64),
        index_dim=config.get("index_head_dim", 128),
        index_top_k=config.get("index_topk", 512),
        moe=MoEConfig(
            num_experts=config["n_routed_experts"],
            top_k=config["num_experts_per_tok"],
            expert_size=width,
            score=config.get("scoring_func", "sqrtsoftplus"),
            scaling=config.get("routed_scaling_factor", 1.5),
            has_bias=True,
            shared_size=width,
        ),
        clamp=config.get("swiglu_limit", 10.0),
        vocab_size=config["vocab_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
        main_rope=main,
        compress_rope=compress,
    )


def _attention_kinds(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    kinds = config.get("layer_types")
    if kinds is None and config.get("compress_ratios") is not None:
        kinds = [_RATIOS.get(ratio, str(ratio)) for ratio in config["compress_ratios"]]
    if kinds is None:
        kinds = [HEAVY] * min(layers, 2) + [SPARSE if i % 2 else HEAVY for i in range(max(layers - 2, 0))]
    return _per_layer("layer_types", kinds, layers, (SLIDING, SPARSE, HEAVY))


def _hashed(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        first = min(layers, config.get("num_hash_layers", 3))
        kinds = ["hash_moe"] * first + ["moe"] * (layers - first)
    return tuple(kind == "hash_moe" for kind in _per_layer("mlp_layer_types", kinds, layers, ("hash_moe", "moe")))


def _per_layer(key: str, kinds: list[str], layers: int, known: tuple[str, ...]) -> tuple[str, ...]:
    wrong = [kind for kind in kinds if kind not in known]
    if wrong or len(kinds) < layers:
        rule = f"must name one of {', '.join(known)} for each of num_hidden_layers = {layers}"
        raise InputError(key, wrong[0] if wrong else f"{len(kinds)} entries", rule, "Save the model's config again.")
    return tuple(kinds[:layers])


def _rates(config: Mapping[str, Any]) -> dict[str, int]:
    rates = {SPARSE: 4, HEAVY: 128, **(config.get("compress_rates") or {})}
    for kind, older in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        rates[kind] = config.get(older) or rates[kind]
    return rates


def _ropes(config: Mapping[str, Any], head_dim: int) -> tuple[Rope, Rope]:
    """Those of windows and of compressed entries."""
    factor = config.get("partial_rotary_factor")
    if factor is None:
        factor = config["qk_rope_head_dim"] / head_dim if "qk_rope_head_dim" in config else 64 / 512
    stored = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(stored.get("main"), dict) and isinstance(stored.get("compress"), dict):
        main, compress = stored["main"], stored["compress"]
    else:
        main = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
        compress = {**stored, "rope_theta": config.get("compress_rope_theta", 160000.0)}
        if (compress.get("rope_type") or compress.get("type")) == "yarn":
            compress.setdefault("attention_factor", 1.0)  # the model does not scale cos and sin
    longest = config["max_position_embeddings"]
    ropes = [
        read_rope({"rope_parameters": values, "max_position_embeddings": longest}, head_dim, partial=factor)
        for values in (main, compress)
    ]
    for rope in ropes:
        if rope.max_length is not None:
            raise InputError("rope_type", rope.kind, "depends on the sequence's length here", "Use default or yarn.")
        if rope.dim > config.get("index_head_dim", 128):
            raise InputError(
                "index_head_dim",
                config.get("index_head_dim"),
                f"must hold the {rope.dim} rotated channels",
                "Raise it.",
            )
    return ropes[0], ropes[1]


def _refuse(config: Mapping[str, Any], key: str, only: object) -> None:
    if config.get(key, only) != only:
        raise InputError(
            f"{key} of DeepseekV4ForCausalLM",
            config[key],
            f"only {only!r} is computed here",
            "Train a model without it.",
        )
