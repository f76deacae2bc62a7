"""FLOPs are those of the model's own matrix products, and of causal attention."""

import numpy as np
import pytest

from miles_core.errors import InputError
from miles_train.flops import Pairs, forward_flops

QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def test_qwen3_0_6b_is_counted_by_hand():
    # The output projection is 2048 wide, twice the hidden size.
    layer = 1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 1024 * 3072
    head, attention = 151936 * 1024, 2 * 28 * 16 * 2 * 128
    flops = forward_flops(QWEN3_0_6B)
    assert flops.per_token == 2 * 28 * layer
    assert flops.per_logprob == 2 * head
    lengths = [1000, 3, 1]
    pairs = 1000 * 1001 // 2 + 6 + 1
    assert flops.of(lengths, 7) == 2 * 28 * layer * 1004 + 2 * head * 7 + attention * pairs
    assert flops.training(lengths, 7) == 3 * flops.of(lengths, 7)
    # The usual rule, 6 N + 6 L heads head_dim S per token.
    assert flops.training([1024], 1024) / 1024 == pytest.approx(3.93e9, rel=2e-3)


def test_an_untied_model_counts_its_head_once():
    tied, untied = forward_flops(QWEN3_0_6B), forward_flops({**QWEN3_0_6B, "tie_word_embeddings": False})
    assert tied == untied


def test_a_window_counts_the_pairs_inside_it():
    lengths = np.array([1, 4, 9])
    by_hand = sum(min(position + 1, 4) for length in lengths for position in range(length))
    assert Pairs(1.0, 4).of(lengths) == by_hand


def test_an_unknown_model_is_not_guessed():
    with pytest.raises(InputError, match="architectures"):
        forward_flops({**QWEN3_0_6B, "architectures": ["HashedForCausalLM"]})
