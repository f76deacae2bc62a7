"""Packed rows give the logprobs, gradients and updates of padded ones; and the backend follows from the machine."""

import families_hybrid
import families_line
import latent_models
import numpy as np
import pytest
from train_tiny import make_model

pytestmark = pytest.mark.xdist_group("train-megatron")
HYBRID = {**families_hybrid.BASE, **families_hybrid.DENSE, **families_hybrid.EXPERTS, **families_hybrid.layers("lf")}
LATENT = {**latent_models.BASE, "num_hidden_layers": 2, "first_k_dense_replace": 1}
MIXTURE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "stretched rotary embedding": ("llama", {**families_line.BASE, **families_line.YARN}),
    "experts": ("qwen3_moe", {**families_line.BASE, **MIXTURE}),
    "latent attention": ("deepseek_v3", {**LATENT, "rope_parameters": latent_models.YARN}),
    "gated DeltaNet": ("qwen3_next", HYBRID),
    "sparse attention": ("deepseek_v32", {**LATENT, **latent_models.INDEXER, "num_experts": 8}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("packing") / "model"
    make_model(path)
    return path


def assert_same(packed, padded):
    np.testing.assert_allclose(packed[0], padded[0], atol=1e-5)
    assert packed[1] == pytest.approx(padded[1], rel=1e-4, abs=1e-5)
    for name, weight in packed[2].items():
        np.testing.assert_allclose(weight, padded[2][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "world_size"), [({}, 1), ({"tensor_model_parallel_size": 2}, 2)], ids=["one", "tensor parallel"]
)
def test_packed_is_padded(ranks, model, settings, world_size):
    for packed, padded in ranks.run("in_rank_packing.packed_and_padded", model, settings, world_size=world_size):
        assert_same(packed, padded)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_layer_keeps_samples_apart(ranks, tmp_path, name):
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "model", *FAMILIES[name])
    assert_same(*ranks.run_one("in_rank_packing.packed_and_padded", tmp_path / "model", {"lr": 1e-4}))


def test_packing_is_decided_once(ranks, model):
    asked, default, refused = ranks.run_one("in_rank_packing.which_are_packed", model)
    assert asked and not default
    assert "train.packed" in refused and "CausalAttention" in refused


def test_without_a_gpu_the_backend_is_local(ranks, model):
    implementation, fused, refused = ranks.run_one("in_rank_packing.backends", model)
    assert implementation == "local" and not fused
    assert "transformer_impl" in refused and "there is no GPU" in refused


def test_longest_segments_are_rounded_to_few_lengths(ranks):
    lengths, is_close = ranks.run_one("in_rank_packing.rounded_lengths")
    assert lengths == [128, 128, 256, 1024, 1024, 1280, 5120]
    assert is_close
