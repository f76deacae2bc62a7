"""Floating-point operations of a model, counted from config.json and its weight table.

Matrix products are counted from the table's own shapes, so an output projection is heads * head_dim wide and a mixture
counts the experts that a token visits. Attention is counted causal: a token at position p attends to p + 1 others.
Norms, activations, softmax and the optimizer are not counted, nor is anything that is computed twice: model FLOPs, not
hardware FLOPs (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles_core.errors import InputError
from miles_train.megatron.weights import TABLES
from miles_train.megatron.weights.table import WeightTable

# Forward and backward: a gradient for the input and one for the weights, each as large as the forward product.
TRAINING_PASSES = 3

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Work per pair of a token and one that it looks at.

    Attributes:
        flops: of one pair, over all layers of the kind.
        window: most tokens that one looks at; None for all before it, and itself.
    """

    flops: float
    window: int | None = None

    def of(self, lengths: "np.ndarray[Any, Any]") -> float:
        """FLOPs over causal sequences of these lengths."""
        full = lengths * (lengths + 1) / 2
        if self.window is not None:
            beyond = np.maximum(lengths - self.window, 0)
            full = full - beyond * (beyond + 1) / 2
        return self.flops * float(full.sum())


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs of one forward pass.

    Attributes:
        per_token: products with the weights of all layers.
        per_logprob: the output head; computed only where a logprob is wanted.
        pairs: attention, by kind.
    """

    per_token: float
    per_logprob: float
    pairs: tuple[Pairs, ...]

    def of(self, lengths: "Sequence[int] | np.ndarray[Any, Any]", num_logprobs: int) -> float:
        """FLOPs over sequences of these lengths, in tokens, `num_logprobs` of whose tokens get a logprob."""
        counts = np.asarray(lengths, np.float64)
        attention = sum(kind.of(counts) for kind in self.pairs)
        return self.per_token * float(counts.sum()) + self.per_logprob * num_logprobs + attention

    def training(self, lengths: "Sequence[int] | np.ndarray[Any, Any]", num_logprobs: int) -> float:
        """FLOPs of a forward and backward pass."""
        return TRAINING_PASSES * self.of(lengths, num_logprobs)


def forward_flops(config: Mapping[str, Any]) -> ForwardFlops:
    """Count one forward pass of a model, its multi-token prediction layers left out.

    Args:
        config: config.json of a model that has a weight table.

    Raises:
        InputError: there is no table for its architecture, or it has a kind of attention that is not counted here.
    """
    architecture = config["architectures"][0]
    if architecture not in TABLES:
        raise InputError("architectures", architecture, f"must be one of {', '.join(sorted(TABLES))}", "Train another.")
    text = {**config, **config.get("text_config", {})}
    per_token, head = _products(TABLES[architecture](config, ()), text.get("num_experts_per_tok", 0))
    recurrent, pairs = _attention(text)
    return ForwardFlops(per_token + recurrent, head, pairs)


def _products(table: WeightTable, top_k: int) -> tuple[float, float]:
    """Of all layers and of the head, per token: two operations per weight that the token meets."""
    layers, head = 0, 0
    for row in table.rows:
        if row.megatron.startswith("mtp."):
            continue
        weights = sum(math.prod(shape) for shape in row.shapes if len(shape) > 1)
        if row.megatron in (_EMBEDDING, _HEAD):
            head = weights  # a lookup costs nothing; tied, it is the head as well
            continue
        repeats = 1
        if row.per_layer:
            repeats = table.num_layers if row.layers is None else len(row.layers)
        layers += weights * repeats * (top_k if row.is_expert else 1)
    return 2 * layers, 2 * head


def _attention(text: Mapping[str, Any]) -> tuple[float, tuple[Pairs, ...]]:
    """Per token of recurrent layers, and per pair of the others, over all layers."""
    heads = text["num_attention_heads"]
    if text.get("kv_lora_rank"):
        channels = text["qk_nope_head_dim"] + text["qk_rope_head_dim"] + text["v_head_dim"]
    else:
        channels = 2 * (text.get("head_dim") or text["hidden_size"] // heads)
    score_and_sum = 2.0 * heads * channels
    recurrent, pairs = 0.0, []
    for kind in _layer_types(text):
        if kind == "full_attention":
            pairs.append(Pairs(score_and_sum))
        elif kind == "sliding_attention":
            pairs.append(Pairs(score_and_sum, text["sliding_window"]))
        elif kind == "deepseek_sparse_attention":
            # The indexer looks at everything, attention at what it chose (arXiv:2512.02556).
            pairs.append(Pairs(score_and_sum, text["index_topk"]))
            pairs.append(Pairs(2.0 * text["index_n_heads"] * text["index_head_dim"]))
        elif kind == "linear_attention":
            # Gated delta rule (arXiv:2412.06464): each value head reads its state for k, adds to it, reads it for q.
            state = text["linear_key_head_dim"] * text["linear_value_head_dim"]
            recurrent += 6.0 * text["linear_num_value_heads"] * state
        else:
            raise InputError("layer_types", kind, "its operations are not counted here", "Count them in flops.py.")
    return recurrent, _merged(pairs)


def _merged(pairs: Sequence[Pairs]) -> tuple[Pairs, ...]:
    """One entry for each window."""
    sums: dict[int | None, float] = {}
    for kind in pairs:
        sums[kind.window] = sums.get(kind.window, 0.0) + kind.flops
    return tuple(Pairs(flops, window) for window, flops in sums.items())


def _layer_types(text: Mapping[str, Any]) -> Sequence[str]:
    """The kind of attention in each layer, also of configs that write it another way."""
    layers = text["num_hidden_layers"]
    if text.get("layer_types"):
        return text["layer_types"]
    if text.get("full_attention_interval"):
        every = text["full_attention_interval"]
        return ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    return ["deepseek_sparse_attention" if text.get("index_topk") else "full_attention"] * layers
