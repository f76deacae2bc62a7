"""GLM-4.7-Flash gives what transformers computes."""

import pytest
from family_checks import assert_agrees
from latent_models import BASE, YARN
from layout_checks import assert_layouts_agree

from miles_core.errors import InputError
from miles_train.megatron.weights import glm4_moe_lite

pytestmark = pytest.mark.xdist_group("train-megatron")
CASES = {
    # As the model's own config.json: one group, the first layer dense, shares of rotated channels spelled out.
    "one group": {
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0},
    },
    "dense between, halves": {
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "q_lora_rank": None,
        "rope_interleave": False,
        "tie_word_embeddings": True,
    },
}
LONG = {
    "yarn, biases": {"attention_bias": True, "rope_parameters": YARN, "norm_topk_prob": False},
    "five layers, one expert each": {
        "num_hidden_layers": 5,
        "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "sparse"],
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "v_head_dim": 20,
        "rms_norm_eps": 1e-3,
    },
    "stored in bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_agrees_with_transformers(ranks, tmp_path, case):
    values = {**BASE, **(CASES | LONG)[case]}
    assert_agrees(ranks, tmp_path / "hf", "glm4_moe_lite", values, values.pop("dtype", "float32"))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["tp2", "pp2-uneven", "cp2", "ep2"])
def test_two_ranks_agree_with_one(ranks, tmp_path, layout):
    values = {**BASE, **CASES["dense between, halves"]}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "glm4_moe_lite", values)
    assert_layouts_agree(ranks, tmp_path / "hf", layout)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 16}, "head_dim"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["dense", "sparse", "hash"]}, "mlp_layer_types"),
    ],
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        glm4_moe_lite.table({**BASE, **changes})
