"""Qwen3-Next: gated DeltaNet, gated attention, experts with a gated shared one, as in transformers."""

import pytest
import torch
from families_hybrid import BASE, COMMON, DENSE, EXPERTS, ROUTING, layers
from family_checks import assert_agrees
from layout_checks import assert_layouts_agree

from miles_core.errors import InputError
from miles_train.megatron.hybrid_config import DeltaNetConfig
from miles_train.megatron.weights import qwen3_next
from miles_train.megatron.weights._hybrid import GatedQKV, InterleavedByKeyHead

pytestmark = pytest.mark.xdist_group("train-megatron")
NEXT = {**BASE, **DENSE, **EXPERTS}
NOT_NORMALISED = {"norm_topk_prob": False}
CASES = {
    "odd, not normalised": {**COMMON["odd"], **NOT_NORMALISED},
    "dense and sparse layers, tied": {
        **layers("lflff"),
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
        "tie_word_embeddings": True,
    },
}
LONG = {
    **COMMON,
    **ROUTING,
    **{f"{name}, not normalised": {**values, **NOT_NORMALISED} for name, values in ROUTING.items()},
    "no experts": {**layers("fl"), "num_experts": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_qwen3_next_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "qwen3_next", {**NEXT, **CASES[name]})


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_more_of_qwen3_next_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "qwen3_next", {**NEXT, **LONG[name]})


@pytest.mark.long
def test_weights_of_qwen3_next_stored_in_bfloat16_agree(ranks, tmp_path):
    assert_agrees(ranks, tmp_path / "hf", "qwen3_next", {**NEXT, **layers("lf")}, dtype="bfloat16")


@pytest.mark.long
def test_the_hubs_spelling_of_qwen3_next_means_the_same(ranks, tmp_path):
    added = {"rope_theta": 500.0, "rope_scaling": None, "full_attention_interval": 3}
    without = ["rope_parameters", "layer_types", "partial_rotary_factor"]
    assert_agrees(ranks, tmp_path / "hf", "qwen3_next", {**NEXT, **layers("llf")}, without=without, added=added)


@pytest.mark.long
def test_ranks_of_a_layout_of_qwen3_next_compute_what_one_does(ranks, tmp_path):
    values = {**NEXT, **layers("lflf"), "mlp_only_layers": [1]}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "qwen3_next", values)
    assert_layouts_agree(ranks, tmp_path / "hf", "tp2", "pp2", "cp2", "ep2", "tp2-pp2", "tp2-ep2")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_queries_and_gates_are_apart_in_each_group(num_shards):
    fusion = GatedQKV(num_heads=4, num_groups=2, head_dim=3).sharded(num_shards)
    heads, groups = 4 // num_shards, 2 // num_shards
    parts = [torch.randn(rows, 5) for rows in (2 * heads * 3, groups * 3, groups * 3)]
    whole = fusion.join(parts)
    # transformers views q_proj as [heads, 2 * head_dim], Megatron linear_qkv as [groups, (2 * heads + 2) * head_dim].
    query, gate = parts[0].view(heads, 6, 5).chunk(2, dim=1)
    group = whole.view(groups, 6, 3, 5)[-1]
    assert torch.equal(group[:2], query[-2:]) and torch.equal(group[2:4], gate[-2:])
    assert torch.equal(group[4], parts[1][-3:]) and torch.equal(group[5], parts[2][-3:])
    assert all(torch.equal(a, b) for a, b in zip(fusion.split(whole), parts, strict=True))


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (3, 3, 2, 2), (2, 6, 1, 4)])
def test_projections_by_key_head_come_back_bit_for_bit(shape):
    delta = DeltaNetConfig(*shape, conv_width=4)
    keys, values = delta.key_heads * delta.key_dim, delta.value_heads * delta.value_dim
    parts = [torch.randn(2 * keys + 2 * values, 7), torch.randn(2 * delta.value_heads, 7)]
    fusion = InterleavedByKeyHead(delta)
    assert all(torch.equal(a, b) for a, b in zip(fusion.split(fusion.join(parts)), parts, strict=True))
    sharded = fusion.sharded(delta.key_heads)  # one key head each: nothing is interleaved
    first = [part.chunk(delta.key_heads)[0] for part in parts]
    assert torch.equal(sharded.join(first), torch.cat(first))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"linear_num_value_heads": 5},
            "linear_num_value_heads in config.json = 5: must be a multiple of linear_num_k",
        ),
        ({"hidden_act": "gelu"}, "hidden_act.* = 'gelu': only 'silu'"),
        ({"attn_output_gate": False}, "attn_output_gate.* = False: only True"),
        ({"layer_types": ["full_attention"]}, "layer_types in config.json .* for each of 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types in config.json .* for each of 2 layers"),
        (
            {"shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size in config.json = 0: must be at least",
        ),
        ({"full_attention_interval": 0}, "full_attention_interval in config.json = 0: must be at least 1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9: must lie in 1 to 4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
    ],
)
def test_what_no_layer_computes_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        qwen3_next.read_config({**NEXT, "num_hidden_layers": 2, **values})
