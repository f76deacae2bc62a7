"""Qwen3.5 and Qwen3.6, text part: dense and with experts, alone and beside a vision tower, as in transformers."""

import numpy as np
import pytest
import torch
from families_hybrid import BASE, COMMON, DENSE, EXPERTS, ROUTING, layers, rope
from family_checks import LOGITS, assert_agrees, differences
from layout_checks import CP2, EP2, PP2, TP2, assert_layouts_agree

from miles_core.errors import InputError
from miles_train.megatron.layout import check_layout
from miles_train.megatron.weights import qwen3_5
from miles_train.model_dir import open_model_directory

pytestmark = pytest.mark.xdist_group("train-megatron")
TEXT = {"qwen3_5_text": {**BASE, **DENSE}, "qwen3_5_moe_text": {**BASE, **EXPERTS}}
MROPE = rope("default", partial_rotary_factor=0.5, mrope_section=[2, 1, 1], mrope_interleaved=True)
CASES = {
    "dense": ("qwen3_5_text", {**layers("lllf"), **MROPE, "tie_word_embeddings": True, "attention_bias": True}),
    "experts": ("qwen3_5_moe_text", {**COMMON["odd"], **ROUTING["odd-experts"], **layers("fll")}),
}
LONG = {
    **{f"dense, {name}": ("qwen3_5_text", values) for name, values in COMMON.items()},
    **{f"experts, {name}": ("qwen3_5_moe_text", values) for name, values in {**COMMON, **ROUTING}.items()},
    # Transformers' class does not know the switch.
    "experts, not normalised": ("qwen3_5_moe_text", {**layers("lf"), "norm_topk_prob": False}),
}
LAYOUTS = ("tp2-whole-sequences", "cp2")
LONG_LAYOUTS = {
    "qwen3_5_text": (*LAYOUTS, "dp2", "tp2", "pp2", "pp2-vp2", "tp2-pp2", "tp2-cp2", "tp4", "cp4"),
    "qwen3_5_moe_text": (
        "tp2",
        "pp2",
        "cp2",
        "ep2",
        "etp2",
        "tp2-ep2-etp1",
        "cp2-ep2",
        "tp2-pp2",
        "tp2-ep2",
        "pp2-ep2",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_qwen3_5_is_that_of_transformers(ranks, tmp_path, name):
    model_type, values = CASES[name]
    assert_agrees(ranks, tmp_path / "hf", model_type, {**TEXT[model_type], **values})


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_more_of_qwen3_5_is_that_of_transformers(ranks, tmp_path, name):
    model_type, values = LONG[name]
    assert_agrees(ranks, tmp_path / "hf", model_type, {**TEXT[model_type], **values})


@pytest.mark.long
@pytest.mark.parametrize("model_type", TEXT)
def test_weights_of_qwen3_5_stored_in_bfloat16_agree(ranks, tmp_path, model_type):
    assert_agrees(ranks, tmp_path / "hf", model_type, {**TEXT[model_type], **layers("lf")}, dtype="bfloat16")


def with_vision(ranks, path, model_type, like_the_hub, **values):
    path.mkdir()
    text = {**TEXT[model_type + "_text"], **layers("lf"), **values}
    ranks.run_one("in_rank_hybrid.make_with_vision", path, model_type, text, like_the_hub)


def stored_weights(path):
    directory = open_model_directory(path)
    with directory.reader() as read:
        return {name: read(name) for name in directory.tensors}


VISIONS = {
    "dense, tied": ("qwen3_5", False, {"tie_word_embeddings": True}),
    "dense, of the hub": ("qwen3_5", True, {}),
    "experts": ("qwen3_5_moe", False, {"tie_word_embeddings": True}),
}


def check_vision(ranks, tmp_path, model_type, like_the_hub, values):
    with_vision(ranks, tmp_path / "hf", model_type, like_the_hub, **values)
    assert differences(ranks.run_one("in_rank_reference.compare_with_transformers", tmp_path / "hf")) == []
    ours, theirs = ranks.run_one("in_rank_hybrid.logits_of_the_whole", tmp_path / "hf", tmp_path / "out")
    assert np.abs(ours - theirs).max() <= LOGITS * np.abs(theirs).max()
    before, after = stored_weights(tmp_path / "hf"), stored_weights(tmp_path / "out")
    assert set(before) == set(after) and any(name.startswith("model.visual.") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_text_part_beside_vision_is_trained_and_the_rest_passes_through(ranks, tmp_path):
    check_vision(ranks, tmp_path, "qwen3_5_moe", True, {})


@pytest.mark.long
@pytest.mark.parametrize("name", VISIONS)
def test_more_text_parts_beside_vision(ranks, tmp_path, name):
    check_vision(ranks, tmp_path, *VISIONS[name])


def test_packed_samples_do_not_see_each_other(ranks, tmp_path):
    values = {**TEXT["qwen3_5_text"], **layers("lf")}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "qwen3_5_text", values)
    packed, apart = ranks.run_one("in_rank_hybrid.packed_and_apart", tmp_path / "hf")
    assert np.abs(packed - apart).max() <= 1e-5 * np.abs(apart).max()


def test_decays_stay_in_float32_beside_a_model_in_bfloat16(ranks, tmp_path):
    values = {**TEXT["qwen3_5_moe_text"], **layers("lfl")}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "qwen3_5_moe_text", values)
    before, after, logprobs, wide = ranks.run_one("in_rank_hybrid.train_in_bfloat16", tmp_path / "hf")
    names = [f"model.layers.{layer}.linear_attn.{name}" for layer in (0, 2) for name in ("A_log", "dt_bias")]
    stored = stored_weights(tmp_path / "hf")
    assert sorted(before) == sorted(after) == sorted(names)
    for name in names:
        assert torch.equal(before[name], stored[name])
        # bfloat16 has no number as near.
        assert 0 < (after[name] - before[name]).abs().max() < 2e-4
    assert np.abs(logprobs - wide).mean() < 0.1


# Heads of all kinds for four ranks, and layers for two stages of two virtual ones.
DIVISIBLE = {
    **layers("lflf"),
    "num_key_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


def check_layouts(ranks, tmp_path, model_type, *names):
    values = {**TEXT[model_type], **DIVISIBLE}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", model_type, values)
    assert_layouts_agree(ranks, tmp_path / "hf", *names)


def test_ranks_of_a_layout_compute_what_one_does(ranks, tmp_path):
    check_layouts(ranks, tmp_path, "qwen3_5_text", *LAYOUTS)


@pytest.mark.long
@pytest.mark.parametrize("model_type", TEXT)
def test_ranks_of_more_layouts_compute_what_one_does(ranks, tmp_path, model_type):
    check_layouts(ranks, tmp_path, model_type, *LONG_LAYOUTS[model_type])


CHAINS = {
    "qwen3_5_text": [({}, 1), (TP2, 2), (PP2, 2), ({**TP2, **PP2}, 4), (CP2, 2)],
    "qwen3_5_moe_text": [(EP2, 2), ({}, 1), ({**TP2, **EP2}, 4), (PP2, 2)],
}


def check_chain(ranks, tmp_path, model_type, chain):
    """A checkpoint goes through the layouts of a chain and back to the first one, bit for bit."""
    (first, world_size), *others = chain
    model = tmp_path / "model"
    ranks.run_one("in_rank_reference.make_reference_model", model, model_type, {**TEXT[model_type], **DIVISIBLE})
    ranks.run("in_rank_files.train_and_save", model, first, tmp_path, world_size=world_size)
    loaded = "saved"
    for number, (layout, size) in enumerate(others):
        saved = f"again-{number}"
        ranks.run("in_rank_files.load_and_save", model, layout, tmp_path, loaded, saved, world_size=size)
        ours, theirs = stored_weights(tmp_path / f"hf-{saved}"), stored_weights(tmp_path / "trained")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        loaded = saved
    ranks.run("in_rank_files.compare", model, first, tmp_path, loaded, world_size=world_size)


BFLOAT16 = {"bf16": True}


def test_a_checkpoint_of_mixed_dtypes_keeps_every_parameters_state(ranks, tmp_path):
    check_chain(ranks, tmp_path, "qwen3_5_text", [(BFLOAT16, 1), ({**TP2, **BFLOAT16}, 2)])


@pytest.mark.long
@pytest.mark.parametrize("precision", [{}, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", CHAINS)
def test_a_hybrid_checkpoint_goes_through_layouts_bit_for_bit(ranks, tmp_path, model_type, precision):
    check_chain(ranks, tmp_path, model_type, [({**layout, **precision}, size) for layout, size in CHAINS[model_type]])


def test_heads_that_ranks_cannot_share_are_refused():
    layout = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
    config = {**TEXT["qwen3_5_text"], **layers("lf"), "linear_num_key_heads": 2}
    with pytest.raises(InputError, match=r"context_parallel_size = 4: must divide linear_num_key_heads = 2"):
        check_layout(layout, 4, config)


def test_the_head_is_tied_where_the_whole_model_says_so():
    text = {**TEXT["qwen3_5_text"], **layers("lf"), "tie_word_embeddings": True}
    whole = {"text_config": text, "tie_word_embeddings": False}
    assert "lm_head.weight" in qwen3_5.dense_table(whole).shapes()
    tied = qwen3_5.dense_table({**whole, "tie_word_embeddings": True})
    assert tied.tied == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert qwen3_5.dense_table({**text, "tie_word_embeddings": True}).tied["lm_head.weight"].startswith("model.embed")
