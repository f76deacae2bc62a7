"""Sparse attention, DeepSeek-V3.2 and GLM-5: what the indexer chooses and what comes of it is as in transformers."""

import pytest
from family_checks import assert_agrees
from latent_models import BASE, INDEXER, YARN
from layout_checks import assert_layouts_agree

from miles_core.errors import InputError
from miles_train.megatron.weights import deepseek_v32, glm_moe_dsa

pytestmark = pytest.mark.xdist_group("train-megatron")
V32, GLM = "deepseek_v32", "glm_moe_dsa"
SPARSE = {**BASE, **INDEXER, "first_k_dense_replace": 1}
SHARED = {"num_hidden_layers": 5, "indexer_types": ["full", "shared", "shared", "full", "shared"]}
CASES = {
    "v3.2, idle experts": (V32, {"num_experts": 11}),
    "v3.2, one key, biases, yarn": (
        V32,
        {"index_topk": 1, "index_head_dim": 8, "num_experts": 8, "attention_bias": True, "rope_parameters": YARN},
    ),
    "glm-5": (GLM, {"n_group": 1, "topk_group": 1}),
    "glm-5, shared choices": (GLM, SHARED),
}
LONG = {
    "v3.2, layers by type, tied": (
        V32,
        {"num_experts": 8, "mlp_layer_types": ["sparse", "dense", "sparse"], "tie_word_embeddings": True},
    ),
    "v3.2, all keys": (V32, {"num_experts": 8, "index_topk": 64}),
    "glm-5, every second": (
        GLM,
        {
            "num_hidden_layers": 5,
            "index_topk_freq": 2,
            "index_skip_topk_offset": 1,
            "index_topk": 3,
            "norm_topk_prob": False,
            "rope_parameters": YARN,
        },
    ),
    "glm-5, everything": (
        GLM,
        {
            "index_topk": 2,
            "mlp_layer_types": ["sparse", "sparse", "dense"],
            "attention_bias": True,
            "rope_parameters": YARN,
            "tie_word_embeddings": True,
            "n_routed_experts": 6,
            "n_group": 3,
            "num_experts_per_tok": 4,
        },
    ),
    "glm-5, a pattern": (GLM, {"num_hidden_layers": 4, "index_topk_pattern": "FSFS", "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_agrees_with_transformers(ranks, tmp_path, case):
    model_type, changes = (CASES | LONG)[case]
    values = {**SPARSE, **changes}
    assert_agrees(ranks, tmp_path / "hf", model_type, values, values.pop("dtype", "float32"))


def make_shared(ranks, path):
    values = {**SPARSE, "num_hidden_layers": 4, "indexer_types": ["full", "shared"] * 2}
    ranks.run_one("in_rank_reference.make_reference_model", path, GLM, values)


def test_two_ranks_agree_with_one(ranks, tmp_path):
    make_shared(ranks, tmp_path / "hf")
    assert_layouts_agree(ranks, tmp_path / "hf", "tp2", "pp2")


@pytest.mark.long
@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp4", "tp2-pp2", "tp2-ep2", "pp2-ep2"])
def test_ranks_agree_with_one(ranks, tmp_path, layout):
    make_shared(ranks, tmp_path / "hf")
    assert_layouts_agree(ranks, tmp_path / "hf", layout)


@pytest.mark.long
@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"context_parallel_size": 2}, "an indexer sees all keys"),
        (
            {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
            "a stage would start with layer 1",
        ),
        (
            {"pipeline_model_parallel_size": 2, "recompute_granularity": "selective"},
            "cannot be recomputed in a pipeline",
        ),
    ],
)
def test_layouts_without_a_choice_to_share_are_refused(ranks, tmp_path, layout, words):
    make_shared(ranks, tmp_path / "hf")
    with pytest.raises(AssertionError, match=words):
        ranks.run("in_rank_layouts.run", tmp_path / "hf", layout, world_size=2)


@pytest.mark.parametrize(
    ("changes", "full"),
    [
        ({}, (0, 1, 2, 3, 4)),
        ({"index_topk_freq": 3}, (0, 1, 4)),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, (0, 2, 4)),
        ({"index_topk_pattern": "FSSFS", "index_topk_freq": 2}, (0, 3)),
        ({"indexer_types": ["full", "shared"] * 3, "index_topk_pattern": "FFFFF"}, (0, 2, 4)),
    ],
)
def test_which_layers_have_an_indexer(changes, full):
    config = glm_moe_dsa.read_config({**SPARSE, "num_hidden_layers": 5, **changes})
    assert config.indexer.full_layers == full


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (deepseek_v32, {"num_experts": 7}, "num_experts"),
        (deepseek_v32, {"q_lora_rank": None}, "q_lora_rank"),
        (glm_moe_dsa, {"index_head_dim": 4}, "index_head_dim"),
        (glm_moe_dsa, {"indexer_types": ["shared", "full", "full"]}, "first layer must be full"),
        (glm_moe_dsa, {"indexer_types": ["full", "full"]}, "indexer_types"),
        (glm_moe_dsa, {"index_topk_pattern": "FXF"}, "indexer_types"),
    ],
)
def test_what_cannot_be_is_refused(family, changes, words):
    with pytest.raises(InputError, match=words):
        family.table({**SPARSE, "num_experts": 8, **changes})
