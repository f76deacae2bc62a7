"""Kimi K2, K2.5 and K2.6: DeepSeek-V3 by another config, and behind a prefix beside a vision tower."""

import json

import pytest
import torch
from family_checks import assert_agrees, differences
from latent_models import BASE, derived
from safetensors.torch import load_file

pytestmark = pytest.mark.xdist_group("train-megatron")
# As the model's own config.json: one group, one dense layer, a stretch of 32 with beta_fast = 1.
KIMI = {
    **BASE,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 16,
    },
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 0,
}
PREFIX = "language_model."
VISION = {"vision_tower.encoder.blocks.0.wqkv.weight": (6, 4), "mm_projector.proj.0.weight": (4, 6)}


def test_k2_agrees_with_transformers(ranks, tmp_path):
    assert_agrees(ranks, tmp_path / "hf", "deepseek_v3", KIMI)


@pytest.fixture(scope="module", params=[{}, {"tie_word_embeddings": True, "q_lora_rank": None}], ids=["", "tied"])
def directories(request, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi")
    text, whole = folder / "text", folder / "whole"
    ranks.run_one("in_rank_reference.make_reference_model", text, "deepseek_v3", {**KIMI, **request.param})

    def config(inner):
        return {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "text_config": inner,
            "vision_config": {"hidden_size": 4},
        }

    vision = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in VISION.items()}
    derived(text, whole, config, vision, PREFIX)
    return text, whole


def test_k25_agrees_with_transformers_behind_its_prefix(ranks, directories):
    text, whole = directories
    result = ranks.run_one("in_rank_reference.compare_with_transformers", whole, None, text, PREFIX)
    assert differences(result) == []


def test_the_vision_tower_passes_through_export(ranks, directories, tmp_path):
    _, whole = directories
    ranks.run_one("in_rank_trainer.import_and_export", whole, {}, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (whole, tmp_path / "out"))
    assert before.keys() == after.keys() and VISION.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    config, exported = (json.loads((path / "config.json").read_text()) for path in (whole, tmp_path / "out"))
    assert exported == {**config, "dtype": "float32"}
