"""No field of a config class is passed over: each is honoured, refused or known to change nothing.

The families with grouped-query attention. A field that a later transformers adds fails the first test.
"""

import pytest
from families_line import BASE
from family_checks import fields_of
from transformers import Glm4MoeConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from miles_core.errors import InputError
from miles_train.megatron.weights import glm4_moe, llama, qwen2, qwen3, qwen3_moe

# Another value of each field, which must change what is read.
HONOURED = {
    "vocab_size": 17,
    "hidden_size": 64,
    "intermediate_size": 49,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
}
REFUSED = {"hidden_act": "gelu"}
# Values that must not. Dropout is off, weights are read, auxiliary losses are off, nothing is generated.
IRRELEVANT = {
    "initializer_range": 0.5,
    "use_cache": False,
    "attention_dropout": 0.5,
    "bos_token_id": 3,
    "eos_token_id": [3],
    "pad_token_id": 3,  # honoured where the model is built: specs/embedding.py
}
WINDOWS = {"use_sliding_window": True}
UNUSED_WINDOWS = {"sliding_window": 7, "max_window_layers": 1}
EXPERTS = {"moe_intermediate_size": 25, "num_experts_per_tok": 3}
CASES = {
    "llama": (
        llama,
        LlamaConfig,
        {},
        {**HONOURED, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        REFUSED,
        {**IRRELEVANT, "pretraining_tp": 2},
    ),
    "qwen2": (
        qwen2,
        Qwen2Config,
        {"max_window_layers": 0},
        HONOURED,
        {**REFUSED, **WINDOWS, "layer_types": ["full_attention", "sliding_attention"]},
        {**IRRELEVANT, **UNUSED_WINDOWS},
    ),
    "qwen3": (
        qwen3,
        Qwen3Config,
        {"max_window_layers": 0},
        {**HONOURED, "attention_bias": True, "head_dim": 16},
        {**REFUSED, **WINDOWS, "layer_types": ["full_attention", "sliding_attention"]},
        {**IRRELEVANT, **UNUSED_WINDOWS},
    ),
    "qwen3_moe": (
        qwen3_moe,
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {
            **HONOURED,
            **EXPERTS,
            "attention_bias": True,
            "num_experts": 5,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0],
        },
        {**REFUSED, **WINDOWS},
        {**IRRELEVANT, "sliding_window": 7, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
    "glm4_moe": (
        glm4_moe,
        Glm4MoeConfig,
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
        },
        {
            **HONOURED,
            **EXPERTS,
            "attention_bias": True,
            "n_routed_experts": 12,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "n_group": 2,
            "topk_group": 3,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "use_qk_norm": True,
        },
        REFUSED,
        IRRELEVANT,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_field_is_accounted_for(name):
    _, config_class, _, honoured, refused, irrelevant = CASES[name]
    assert fields_of(config_class) == {*honoured, *refused, *irrelevant}


@pytest.mark.parametrize("name", CASES)
def test_every_field_does_what_it_is_said_to(name):
    family, _, values, honoured, refused, irrelevant = CASES[name]
    values = {**BASE, **values}
    plain = family.read_config(values)
    for field, value in honoured.items():
        assert family.read_config({**values, field: value}) != plain, field
    for field, value in refused.items():
        with pytest.raises(InputError):
            family.read_config({**values, field: value})
    for field, value in irrelevant.items():
        assert family.read_config({**values, field: value}) == plain, field
