"""Layers for multi-token prediction: trained, their gradients are those of the formula; else they cost nothing."""

import numpy as np
import pytest
from latent_models import BASE
from layout_checks import assert_layouts_agree
from safetensors.torch import load_file

from miles_core.errors import InputError
from miles_train.megatron.weights import table_for
from miles_train.model_dir import open_model_directory

pytestmark = pytest.mark.xdist_group("train-megatron")
CASES = {
    "deepseek": ("deepseek_v3", {"first_k_dense_replace": 1, "num_hidden_layers": 2}, 1),
    "deepseek, two layers, tied": (
        "deepseek_v3",
        {"first_k_dense_replace": 1, "num_hidden_layers": 2, "tie_word_embeddings": True, "q_lora_rank": None},
        2,
    ),
}
LONG = {
    "glm flash": ("glm4_moe_lite", {"num_hidden_layers": 3}, 1),
    "glm 4.5": (
        "glm4_moe",
        {"num_hidden_layers": 2, "head_dim": 16, "num_key_value_heads": 2, "use_qk_norm": True, "attention_bias": True},
        1,
    ),
}


def make(ranks, path, case):
    model_type, values, num_more = (CASES | LONG)[case]
    ranks.run_one("in_rank_more_tokens.make_model", path, model_type, {**BASE, **values}, num_more)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)])
def test_gradients_are_those_of_the_formula(ranks, tmp_path, case):
    make(ranks, tmp_path / "hf", case)
    (ours, theirs), gradients, changed = ranks.run_one("in_rank_more_tokens.compare", tmp_path / "hf")
    assert changed == []
    assert np.abs(ours - theirs).max() <= 1e-5
    for name, (ours, theirs) in gradients.items():
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), name


def test_tensor_parallel_gradients_are_those_of_one_rank(ranks, tmp_path):
    make(ranks, tmp_path / "hf", "deepseek")
    settings = {"mtp_loss_scaling_factor": 0.3}
    assert_layouts_agree(ranks, tmp_path / "hf", "tp2", "dp2", "ep2", settings=settings)


def test_heads_apart_leave_the_model_alone(ranks, tmp_path):
    make(ranks, tmp_path / "hf", "deepseek")
    together, apart, without = (
        ranks.run_one("in_rank_layouts.run", tmp_path / "hf", settings)[3]
        for settings in (
            {"mtp_loss_scaling_factor": 0.3},
            {"mtp_loss_scaling_factor": 0.3, "mtp_detach_heads": True},
            {},
        )
    )
    copies = {f"model.layers.2.{name}.weight" for name in ("embed_tokens", "shared_head.head")}
    extra = {name for name in together if name.startswith("model.layers.2.")} - copies
    main = without.keys() - extra - copies
    assert all(np.array_equal(apart[name], without[name]) for name in main)
    o_proj = "model.layers.{}.self_attn.o_proj.weight"
    assert not np.array_equal(together[o_proj.format(1)], without[o_proj.format(1)])
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert not np.array_equal(apart[o_proj.format(2)], stored[o_proj.format(2)].numpy())
    assert np.array_equal(apart["model.layers.2.embed_tokens.weight"], apart["model.embed_tokens.weight"])


@pytest.mark.long
@pytest.mark.parametrize("layout", ["pipeline_model_parallel_size", "context_parallel_size"])
def test_layouts_that_part_a_layer_from_its_embedding_are_refused(ranks, tmp_path, layout):
    make(ranks, tmp_path / "hf", "deepseek")
    with pytest.raises(AssertionError, match="must be 1 where mtp_loss_scaling_factor is set"):
        ranks.run("in_rank_layouts.run", tmp_path / "hf", {layout: 2, "mtp_loss_scaling_factor": 0.3}, world_size=2)


def test_a_model_without_such_layers_is_refused(ranks, tmp_path):
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "deepseek_v3", BASE)
    with pytest.raises(InputError, match="the model has no layers for multi-token prediction"):
        table_for(open_model_directory(tmp_path / "hf"), predicts_more=True)
