"""DeepSeek-V3: latent attention and its experts give what transformers computes, in every layout."""

import numpy as np
import pytest
import torch
from family_checks import assert_agrees
from latent_models import BASE, YARN, derived
from layout_checks import LAYOUTS, assert_layouts_agree
from safetensors.torch import load_file

from miles_core.errors import InputError
from miles_train.megatron.weights import TABLES, deepseek

pytestmark = pytest.mark.xdist_group("train-megatron")
MIXED = {**BASE, "first_k_dense_replace": 1}
CASES = {
    "yarn, biases": {"attention_bias": True, "rope_parameters": YARN},
    "queries at once, halves, tied": {
        "q_lora_rank": None,
        "rope_interleave": False,
        "tie_word_embeddings": True,
        "norm_topk_prob": False,
        "n_shared_experts": 2,
    },
}
LONG = {
    "odd sizes": {
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 2,
        "v_head_dim": 7,
        "kv_lora_rank": 9,
        "q_lora_rank": 11,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 5,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
    },
    "large values, epsilon": {"v_head_dim": 24, "qk_nope_head_dim": 4, "rms_norm_eps": 1e-3},
    "dense alone": {"first_k_dense_replace": 9},
    "every expert": {"num_experts_per_tok": 8, "n_group": 2, "topk_group": 2},
    "queries at once, biases, yarn without weights": {
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None, "truncate": False},
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "temperature of a linear scaling": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0, "mscale_all_dim": 1.0}
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 48,
            "short_factor": [1.0, 1.3, 1.6, 1.9],
            "long_factor": [2.0] * 4,
        }
    },
    "dynamic, a padding token": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
        "pad_token_id": 3,
    },
    "one head, no shared experts": {
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "n_shared_experts": 0,
        "kv_lora_rank": 5,
        "routed_scaling_factor": 0.1,
        "n_group": 2,
        "topk_group": 1,
        "n_routed_experts": 6,
    },
    "stored in bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_agrees_with_transformers(ranks, tmp_path, case):
    values = {**MIXED, **(CASES | LONG)[case]}
    assert_agrees(ranks, tmp_path / "hf", "deepseek_v3", values, values.pop("dtype", "float32"))


def test_two_ranks_agree_with_one(ranks, tmp_path):
    values = {**MIXED, **CASES["yarn, biases"], "num_hidden_layers": 4}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "deepseek_v3", values)
    assert_layouts_agree(ranks, tmp_path / "hf", "tp2", "pp2-uneven", "cp2")


@pytest.mark.long
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp2-whole-sequences"])
@pytest.mark.parametrize("case", CASES)
def test_every_layout_agrees(ranks, tmp_path, case, layout):
    values = {**MIXED, **CASES[case], "num_hidden_layers": 4}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "deepseek_v3", values)
    assert_layouts_agree(ranks, tmp_path / "hf", layout)


@pytest.mark.long
def test_sequences_beyond_a_dynamic_embedding_are_refused(ranks, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    values = {**MIXED, "rope_parameters": rope, "max_position_embeddings": 8}
    with pytest.raises(AssertionError, match=r"sequence length = \d+: must be at most 8: beyond it"):
        assert_agrees(ranks, tmp_path / "hf", "deepseek_v3", values)


def test_layers_for_more_tokens_pass_through_export(ranks, tmp_path):
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "deepseek_v3", MIXED)
    names = ("enorm.weight", "embed_tokens.weight", "self_attn.q_a_proj.weight", "mlp.experts.7.up_proj.weight")
    extra = {f"model.layers.3.{name}": torch.randn(3, 5) for name in names}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4)
    derived(tmp_path / "hf", tmp_path / "more", lambda config: {**config, "num_nextn_predict_layers": 1}, extra)
    ranks.run_one("in_rank_trainer.import_and_export", tmp_path / "more", {}, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("more", "out"))
    assert before.keys() == after.keys() and extra.keys() <= after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_keys_that_config_json_leaves_out_are_those_of_transformers():
    known = {"num_hidden_layers": 5, "n_routed_experts": 32, "rope_theta": 5e5}
    config = deepseek.read_config(known)
    assert config.sparse_layers == (3, 4) and config.norm_eps == 1e-6 and config.interleaved
    assert (config.moe.num_groups, config.moe.top_groups, config.moe.top_k, config.moe.scaling) == (8, 4, 8, 2.5)
    assert deepseek.read_config({**known, "num_local_experts": 16}).moe.num_experts == 16


@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"n_group": 3}, "n_group"),
        ({"num_experts_per_tok": 9, "n_group": 1, "topk_group": 1}, "num_experts_per_tok"),
    ],
)
def test_values_that_are_not_computed_are_refused(architecture, changes, words):
    with pytest.raises(InputError, match=words):
        TABLES[architecture]({**BASE, **changes}, ())
