"""No field of the hybrid families' config classes is passed over: each is honoured, refused or changes nothing."""

import pytest
from families_hybrid import BASE, DENSE, EXPERTS, FULL, LINEAR
from family_checks import fields_of
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

from miles_core.errors import InputError
from miles_train.megatron.weights import qwen3_5, qwen3_next

# Another value of each field, which must change what is read.
HONOURED = {
    "vocab_size": 17,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.5,
    "tie_word_embeddings": True,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "layer_types": [FULL, FULL, LINEAR, LINEAR],
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 7,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 6,
}
OF_DENSE = {"intermediate_size": 49}
OF_EXPERTS = {
    "moe_intermediate_size": 13,
    "shared_expert_intermediate_size": 21,
    "num_experts": 5,
    "num_experts_per_tok": 3,
}
# Not fields of a class: its constructor reads them, or only SGLang does.
UNNAMED = {"full_attention_interval": 2, "partial_rotary_factor": 0.5}
REFUSED = {"hidden_act": "gelu"}
REFUSED_UNNAMED = {"attn_output_gate": False, "output_gate_type": "sigmoid"}
# Dropout is off, weights are read, nothing is generated; the padding token counts where the model is built.
IRRELEVANT = {
    "initializer_range": 0.5,
    "use_cache": False,
    "attention_dropout": 0.5,
    "bos_token_id": 3,
    "eos_token_id": [3],
    "pad_token_id": 3,
}
NO_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
# Beside a class that has no such field, transformers computes the same.
UNKNOWN = {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": True}
CASES = {
    "qwen3_next": (
        qwen3_next.read_config,
        Qwen3NextConfig,
        {**DENSE, **EXPERTS, "mlp_only_layers": [0]},
        {
            **HONOURED,
            **OF_DENSE,
            **OF_EXPERTS,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
        {**IRRELEVANT, **NO_LOSS},
        UNKNOWN,
    ),
    "qwen3_5": (
        lambda config: qwen3_5.read_config(config, experts=False),
        Qwen3_5TextConfig,
        DENSE,
        {**HONOURED, **OF_DENSE},
        IRRELEVANT,
        {**UNKNOWN, **OF_EXPERTS},
    ),
    "qwen3_5_moe": (
        lambda config: qwen3_5.read_config(config, experts=True),
        Qwen3_5MoeTextConfig,
        EXPERTS,
        {**HONOURED, **OF_EXPERTS},
        {**IRRELEVANT, **NO_LOSS},
        {**UNKNOWN, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_hybrid_field_is_accounted_for(name):
    _, config_class, _, honoured, irrelevant, _ = CASES[name]
    assert fields_of(config_class) == {*honoured, *REFUSED, *irrelevant}


@pytest.mark.parametrize("name", CASES)
def test_every_hybrid_field_does_what_it_is_said_to(name):
    read_config, _, values, honoured, irrelevant, unknown = CASES[name]
    values = {**BASE, **values, "num_hidden_layers": 4}
    plain = read_config(values)
    for field, value in {**honoured, **UNNAMED}.items():
        assert read_config({**values, field: value}) != plain, field
    for field, value in {**irrelevant, **unknown}.items():
        assert read_config({**values, field: value}) == plain, field
    for field, value in {**REFUSED, **REFUSED_UNNAMED}.items():
        with pytest.raises(InputError, match=field):
            read_config({**values, field: value})
