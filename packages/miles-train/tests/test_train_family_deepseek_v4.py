"""DeepSeek-V4: hyper-connections, three kinds of attention and hashed experts give what transformers computes."""

import pytest
from family_checks import differences
from layout_checks import assert_layouts_agree

from miles_core.errors import InputError
from miles_train.megatron.weights import deepseek_v4

pytestmark = pytest.mark.xdist_group("train-megatron")  # one pool of ranks a run

SLIDING, SPARSE, HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
BASE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 20,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "max_position_embeddings": 64,
    "layer_types": [HEAVY, SPARSE, SLIDING, SPARSE],
    "compress_rates": {SPARSE: 2, HEAVY: 3},
    "hc_mult": 3,
    "hc_sinkhorn_iters": 4,
    "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"],
    "sliding_window": 4,
    "o_groups": 2,
    "o_lora_rank": 12,
    # With few heads most scores are 0 after the ReLU, and equal scores are a game of chance.
    "index_n_heads": 16,
    "index_head_dim": 8,
    "index_topk": 2,
    "partial_rotary_factor": 0.5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "all kinds of layers": {},
    "odd sizes": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SPARSE, HEAVY],
        "mlp_layer_types": ["moe", "moe", "hash_moe"],
        "num_attention_heads": 6,
        "o_groups": 3,
        "head_dim": 24,
        "partial_rotary_factor": 0.25,
        "index_head_dim": 12,
        "num_experts_per_tok": 3,
        "swiglu_limit": 0.5,
        "hc_mult": 2,
    },
}
LONG = {
    "yarn, tied, sigmoid": {
        "rope_parameters": YARN,
        "tie_word_embeddings": True,
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
    },
    "four streams": {"hc_mult": 4, "n_routed_experts": 5, "num_experts_per_tok": 4},
    "default kinds": {"layer_types": None, "mlp_layer_types": None, "num_hidden_layers": 5, "hc_sinkhorn_iters": 1},
    "one group, one window": {"o_groups": 1, "sliding_window": 1, "index_topk": 64},
    "nothing compressed": {"compress_rates": {SPARSE: 32, HEAVY: 32}},
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_agrees_with_transformers(ranks, tmp_path, case):
    ranks.run_one("in_rank_deepseek_v4.make_model", tmp_path / "model", {**BASE, **(CASES | LONG)[case]})
    result = ranks.run_one("in_rank_reference.compare_with_transformers", tmp_path / "model")
    assert differences(result) == []


def test_two_ranks_agree_with_one(ranks, tmp_path):
    ranks.run_one("in_rank_deepseek_v4.make_model", tmp_path / "model", BASE)
    assert_layouts_agree(ranks, tmp_path / "model", "tp2", "pp2")


@pytest.mark.long
@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2-ep2-etp1", "tp2-pp2", "tp2-ep2", "pp2-ep2", "pp2-uneven"])
def test_layouts_agree_with_one_rank(ranks, tmp_path, layout):
    ranks.run_one("in_rank_deepseek_v4.make_model", tmp_path / "model", BASE)
    assert_layouts_agree(ranks, tmp_path / "model", layout)


def test_the_published_spelling_is_read_and_written(ranks, tmp_path):
    ranks.run_one("in_rank_deepseek_v4.make_model", tmp_path / "model", BASE)
    spelled = ranks.run_one("in_rank_deepseek_v4.respell", tmp_path / "model", PUBLISHED)
    assert "layers.1.attn.indexer.compressor.ape" in spelled and "layers.0.ffn.experts.3.w2.weight" in spelled
    table = deepseek_v4.table({**BASE, "num_hidden_layers": 4}, spelled)
    assert sorted(table.shapes()) == spelled
    logits, changed = ranks.run_one("in_rank_deepseek_v4.compare_logits", tmp_path / "model")
    assert changed == []
    assert differences({"logits": [logits], "gradients": {}, "exported": []}) == []


# Written from transformers/conversion_mapping.py, "deepseek_v4", read from target to source.
PUBLISHED = [
    (r"^model\.", ""),
    (r"^embed_tokens\.weight$", "embed.weight"),
    (r"^hc_head\.hc_(fn|base|scale)$", r"hc_head_\1"),
    (r"\.attn_hc\.", ".hc_attn_"),
    (r"\.ffn_hc\.", ".hc_ffn_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.bias"),
    (r"\.mlp\.", ".ffn."),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.self_attn\.", ".attn."),
    (r"\.attn\.sinks$", ".attn.attn_sink"),
    (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
    (r"\.q_([ab])_proj\.", r".wq_\1."),
    (r"\.o_([ab])_proj\.", r".wo_\1."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
    (r"\.compressor\.indexer\.wq_b\.", ".indexer.wq_b."),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.compressor\.position_bias$", ".compressor.ape"),
    (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"o_groups": 3}, "o_groups"),
        ({"layer_types": [SLIDING]}, "layer_types"),
        ({"mlp_layer_types": ["moe", "dense", "moe", "moe"]}, "mlp_layer_types"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"index_head_dim": 4}, "index_head_dim"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        deepseek_v4.table({**BASE, **changes})
