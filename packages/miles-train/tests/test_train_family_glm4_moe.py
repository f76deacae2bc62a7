"""GLM-4.5: partial rotary embedding, and a sigmoid router with bias, groups and shared experts, as in transformers."""

import json

import pytest
import torch
from families_line import BASE, LLAMA3, YARN, rope
from family_checks import assert_agrees
from layout_checks import LAYOUTS, assert_layouts_agree
from safetensors.torch import load_file, save_file

from miles_core.errors import InputError
from miles_train.megatron.weights import glm4_moe

pytestmark = pytest.mark.xdist_group("train-megatron")
GLM = {
    **BASE,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
}
CASES = {
    # The best three of two groups of four; Megatron's own router scores these groups by one expert.
    "grouped": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "use_qk_norm": True, "attention_bias": True},
    "not-normalised": {
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": True,
        "n_shared_experts": 2,
        "first_k_dense_replace": 2,
    },
}
LONG = {
    "plain": {},
    "one-of-two-groups": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "all-groups": {"n_group": 4, "topk_group": 4},
    "one-chosen-of-groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 1},
    "one-chosen": {"num_experts_per_tok": 1, "routed_scaling_factor": 0.7},
    "one-chosen-not-normalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all-chosen": {"num_experts_per_tok": 8, "norm_topk_prob": False},
    "one-key-head": {"use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 1},
    "all-layers": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "no-layer": {"first_k_dense_replace": 3},
    "all-channels": {"partial_rotary_factor": 1.0},
    "quarter-of-channels": rope("default", partial_rotary_factor=0.25),
    "odd": {
        "head_dim": 12,
        "hidden_size": 26,
        "num_attention_heads": 6,
        "n_routed_experts": 9,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 5,
        "moe_intermediate_size": 7,
        "intermediate_size": 31,
    },
    "odd-share-of-channels": {"head_dim": 10, "use_qk_norm": True},
    "yarn": YARN,
    # Beside another share, transformers drops this one for all but the default kind.
    "llama3-and-two-shares": {"rope_parameters": {**LLAMA3["rope_parameters"], "partial_rotary_factor": 0.25}},
}


@pytest.mark.parametrize("name", CASES)
def test_glm4_moe_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "glm4_moe", {**GLM, **CASES[name]})


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_more_of_glm4_moe_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "glm4_moe", {**GLM, **LONG[name]})


@pytest.mark.long
def test_weights_of_glm4_moe_stored_in_bfloat16_agree(ranks, tmp_path):
    assert_agrees(ranks, tmp_path / "hf", "glm4_moe", {**GLM, "use_qk_norm": True}, dtype="bfloat16")


@pytest.mark.long
def test_the_hubs_spelling_of_glm4_moe_means_the_same(ranks, tmp_path):
    added = {"rope_theta": 500.0, "rope_scaling": None, "partial_rotary_factor": 0.25}
    assert_agrees(ranks, tmp_path / "hf", "glm4_moe", GLM, without=["rope_parameters"], added=added)


@pytest.fixture(scope="module")
def shared_and_grouped(ranks, tmp_path_factory):
    """Grouped routing, shared experts, biases, norms of queries and keys, a padding token; for layouts of ranks."""
    path = tmp_path_factory.mktemp("glm4") / "hf"
    values = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "num_hidden_layers": 4, "n_shared_experts": 2}
    values |= {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": True, "pad_token_id": 3}
    ranks.run_one("in_rank_reference.make_reference_model", path, "glm4_moe", {**GLM, **values})
    return path


def test_glm4_moe_is_the_same_on_two_ranks(ranks, shared_and_grouped):
    assert_layouts_agree(ranks, shared_and_grouped, "tp2-ep2-etp1", "cp2-ep2")


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"tp4", "tp2-whole-sequences"}))  # two key heads; experts
def test_glm4_moe_is_the_same_in_every_layout(ranks, shared_and_grouped, name):
    assert_layouts_agree(ranks, shared_and_grouped, name)


def test_layers_that_predict_further_tokens_pass_through(ranks, tmp_path):
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "glm4_moe", GLM)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    stored = load_file(tmp_path / "hf/model.safetensors")
    stored |= {f"model.layers.3.{name}.weight": torch.randn(3, 2).bfloat16() for name in ("eh_proj", "mlp.gate")}
    save_file(stored, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    ranks.run_one("in_rank_trainer.import_and_export", tmp_path / "hf", {}, tmp_path / "out")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    assert all(exported[name].dtype == stored[name].dtype for name in stored)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_group": 3}, r"n_group = 3: must divide the experts"),
        ({"n_group": 8, "topk_group": 2}, r"n_group = 8: must leave two experts in a group"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group = 5: must lie in 1 to n_group = 4"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, r"num_experts_per_tok = 3: must lie in 1 to 2"),
        ({"n_shared_experts": 0}, r"n_shared_experts"),
    ],
)
def test_routing_that_no_router_computes_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        glm4_moe.read_config({**GLM, **values})
