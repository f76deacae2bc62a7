"""Families from outside the package: the worked example trains, in several layouts; broken ones are refused."""

import json

import numpy as np
import pytest
import torch
from layout_checks import CP2, LAYOUTS
from safetensors.torch import load_file, save_file

from miles_core.errors import InputError
from miles_train.megatron.families import check_name

pytestmark = pytest.mark.xdist_group("train-megatron")
CONFIG = {
    "architectures": ["GatedHeadsForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("plug-in") / "hf"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    hidden, mlp, width, heads = 24, 40, 40, 4
    shapes = {"model.embed_tokens": (16, hidden), "model.norm": (hidden,), "lm_head": (16, hidden)}
    for layer in range(2):
        parts = {
            "self_attn.q_proj": (width, hidden), "self_attn.k_proj": (width, hidden),
            "self_attn.v_proj": (width, hidden), "self_attn.gate_proj": (heads, hidden),
            "self_attn.o_proj": (hidden, width), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    tensors = {
        f"{name}.weight": 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_a_family_from_outside_computes_what_it_says_learns_and_comes_back_bit_for_bit(ranks, path, tmp_path):
    ours, reference, losses = ranks.run_one("in_rank_plug_in.train", path, tmp_path)
    assert np.abs(ours - reference).max() <= 1e-4 * np.abs(reference).max()
    assert losses[-1] < 0.8 * losses[0]
    stored, exported = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "hf"))
    assert stored.keys() == exported.keys()
    assert all(torch.equal(stored[name], exported[name]) for name in stored)


def test_a_family_from_outside_is_the_same_in_every_layout_and_its_checkpoints_fit_all(ranks, path, tmp_path):
    alone = ranks.run_one("in_rank_plug_in.logprobs_and_checkpoint", path, {}, tmp_path)
    for name in ("tp2", "pp2"):
        world_size, settings = LAYOUTS[name]
        arguments = path, settings, tmp_path
        for result in ranks.run("in_rank_plug_in.logprobs_and_checkpoint", *arguments, world_size=world_size):
            gaps = [float(np.abs(ours - theirs).max()) for ours, theirs in zip(result, alone, strict=True)]
            assert max(gaps) <= 1e-5, (name, gaps)
    assert np.abs(alone[1] - alone[2]).max() == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated_heads", r'model.family = .gated_heads.: a family is named "package.module:name"'),
        ("no_such_package.family:FAMILY", "the package of no_such_package.family cannot be imported"),
        ("no_such_module:FAMILY", "there is no module no_such_module"),
    ],
)
def test_a_driver_refuses_what_cannot_be_found_without_megatron(name, message):
    with pytest.raises(InputError, match=message):
        check_name(name)


def test_what_is_no_family_is_refused_before_weights_are_read(ranks, path):
    messages = {
        "in_rank_plug_in:NO_FAMILY": "must be a miles_train.megatron.families.Family",
        "in_rank_plug_in:MISSING": "in_rank_plug_in has no 'MISSING'",
        "in_rank_plug_in:SPECLESS": "must be a miles_train.megatron.specs.Spec",
        "in_rank_plug_in:ONE_ARGUMENT": "must be callable as MakesTable(config, stored)",
        "in_rank_plug_in:NO_TABLE": "must return a WeightTable",
        "in_rank_plug_in:FEW_LAYERS": "must be num_layers = 2",
    }
    for name, message in messages.items():
        assert message in ranks.run_one("in_rank_plug_in.refusal", path, name), name
    error = ranks.run("in_rank_plug_in.refusal", path, "gated_heads:FAMILY", CP2, world_size=2)[0]
    assert "every token looks at the whole sequence" in error
    assert "model.family" in ranks.run_one("in_rank_plug_in.refusal", path, None)
