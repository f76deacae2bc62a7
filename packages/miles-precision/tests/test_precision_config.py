"""The quantization_config, and the names it ignores."""

import pytest

from miles_precision import BF16, FormatError, FP8Block, with_fused_modules


def test_fp8_config_is_the_published_one():
    assert FP8Block().quantization_config(["lm_head"]) == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }


def test_bf16_checkpoints_have_none():
    assert BF16().quantization_config(["lm_head"]) is None


@pytest.mark.parametrize(
    ("ignored", "completed"),
    [
        ([], []),
        (["lm_head", "lm_head"], ["lm_head"]),
        (["m.1.q_proj", "m.1.k_proj", "m.1.v_proj"], ["m.1.k_proj", "m.1.q_proj", "m.1.qkv_proj", "m.1.v_proj"]),
        (["m.1.gate_up_proj"], ["m.1.gate_proj", "m.1.gate_up_proj", "m.1.up_proj"]),
        (["qkv_proj", "q_proj"], ["k_proj", "q_proj", "qkv_proj", "v_proj"]),
        (["m.1.mlp.gate", "m.1.mlp.down_proj"], ["m.1.mlp.down_proj", "m.1.mlp.gate"]),
        (["m.1"], ["m.1"]),
    ],
)
def test_fused_layers_are_named_by_both_names(ignored, completed):
    assert with_fused_modules(ignored) == completed
    assert with_fused_modules(completed) == completed
    assert FP8Block().quantization_config(ignored)["modules_to_not_convert"] == completed


def test_half_a_fused_layer_is_an_error_that_names_the_other_half():
    with pytest.raises(FormatError, match=r"name m.1.q_proj but not m.1.k_proj, m.1.v_proj: .* into m.1.qkv_proj"):
        FP8Block().quantization_config(["m.1.q_proj", "m.2.k_proj", "m.2.v_proj"])


def test_a_model_may_fuse_otherwise():
    latent = {"fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa")}
    names = ["m.q_proj", "m.q_a_proj", "m.kv_a_proj_with_mqa"]
    assert with_fused_modules(names, latent) == sorted([*names, "m.fused_qkv_a_proj_with_mqa"])
    assert FP8Block().quantization_config(["m.q_proj"], fused={})["modules_to_not_convert"] == ["m.q_proj"]
