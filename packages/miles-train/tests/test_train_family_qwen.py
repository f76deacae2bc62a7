"""Qwen2.5, Qwen3 and Qwen3-MoE: every flag and every kind of routing give what transformers computes."""

import pytest
from families_line import BASE, YARN, YARN_MSCALE, rope
from family_checks import assert_agrees

from miles_core.errors import InputError
from miles_train.megatron.weights import qwen2, qwen3, qwen3_moe

pytestmark = pytest.mark.xdist_group("train-megatron")
MOE = {
    **BASE,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
}
CASES = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-yarn": ("qwen2", {**YARN, "head_dim": 12}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": ("qwen3", {"head_dim": 10, "attention_bias": True, "num_key_value_heads": 4}),
    "qwen3-moe-some-layers": ("qwen3_moe", {**MOE, "decoder_sparse_step": 2, "num_hidden_layers": 5}),
    "qwen3-moe-odd": (
        "qwen3_moe",
        {
            **MOE,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "moe_intermediate_size": 5,
            "hidden_size": 22,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
}
LONG_DENSE = {
    "qwen2-plain": ("qwen2", {}),
    "qwen2-windows-unused": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen2-odd": (
        "qwen2",
        {"hidden_size": 21, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 6, "intermediate_size": 5},
    ),
    "qwen2-dynamic": ("qwen2", {**rope("dynamic", factor=2.0), "num_hidden_layers": 3}),
    "qwen2-every-head-its-own-key": ("qwen2", {"num_key_value_heads": None}),
    "qwen2-yarn-mscale": ("qwen2", YARN_MSCALE),
    "qwen3-plain": ("qwen3", {}),
    "qwen3-odd": (
        "qwen3",
        {"hidden_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14, "num_hidden_layers": 3},
    ),
    "qwen3-yarn": ("qwen3", {**YARN, "head_dim": 8}),
    "qwen3-one-layer": ("qwen3", {"num_hidden_layers": 1, "head_dim": 4, "num_key_value_heads": 1}),
    "qwen3-linear": ("qwen3", {**rope("linear", factor=3.0), "head_dim": 8, "attention_bias": True}),
}
LONG_MOE = {
    "plain": {},
    "normalised": {"norm_topk_prob": True},
    "one-chosen": {"num_experts_per_tok": 1},
    "one-chosen-normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "all-chosen": {"num_experts_per_tok": 4},
    "all-chosen-normalised": {"num_experts_per_tok": 4, "norm_topk_prob": True},
    "dense-layers-named": {"mlp_only_layers": [0, 2]},
    "no-experts": {"num_experts": 0},
    "no-layers-with-experts": {"mlp_only_layers": [0, 1, 2]},
    "biases-tied": {"attention_bias": True, "tie_word_embeddings": True, "num_experts": 3},
    "many": {"num_experts": 33, "num_experts_per_tok": 8, "moe_intermediate_size": 4},
    "one-expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "yarn": YARN,
}


@pytest.mark.parametrize("name", CASES)
def test_qwen_is_that_of_transformers(ranks, tmp_path, name):
    model_type, values = CASES[name]
    assert_agrees(ranks, tmp_path / "hf", model_type, {**BASE, **values})


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_DENSE)
def test_more_of_qwen_is_that_of_transformers(ranks, tmp_path, name):
    model_type, values = LONG_DENSE[name]
    assert_agrees(ranks, tmp_path / "hf", model_type, {**BASE, **values})


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_MOE)
def test_more_of_qwen3_moe_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "qwen3_moe", {**MOE, **LONG_MOE[name]})


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen3_moe"])
def test_weights_of_qwen_stored_in_bfloat16_agree(ranks, tmp_path, model_type):
    values = {**(MOE if model_type == "qwen3_moe" else BASE), "head_dim": 8}
    assert_agrees(ranks, tmp_path / "hf", model_type, values, dtype="bfloat16")


@pytest.mark.long
def test_the_number_of_experts_has_two_names(ranks, tmp_path):
    changes = {"without": ["num_local_experts", "num_experts"], "added": {"num_experts": 4, "rope_theta": 500.0}}
    assert_agrees(ranks, tmp_path / "hf", "qwen3_moe", MOE, **changes)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (qwen2, {"use_sliding_window": True, "max_window_layers": 1}, r"only full attention .* 1 layers are not"),
        (qwen3, {"layer_types": ["sliding_attention"] * 2}, r"layer_types of the model.* 2 layers are not"),
        (qwen3_moe, {**MOE, "use_sliding_window": True}, r"only full attention .* 3 layers are not"),
        (qwen3_moe, {**MOE, "num_experts_per_tok": 5}, r"num_experts_per_tok = 5: must lie in 1 to 4"),
        (qwen3_moe, {**MOE, "hidden_act": "relu"}, r"only 'silu' or 'swish' is computed here"),
    ],
)
def test_what_qwen_would_compute_otherwise_is_refused(family, values, message):
    with pytest.raises(InputError, match=message):
        family.read_config({**BASE, **values})
