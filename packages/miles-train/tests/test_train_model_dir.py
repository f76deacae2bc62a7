"""Bad model directories: one error each, before any weight is read."""

import json
import shutil

import pytest
import train_tiny

from miles_core.errors import InputError
from miles_train.megatron.weights import table_for
from miles_train.model_dir import INDEX, open_model_directory


@pytest.fixture
def directory(tmp_path):
    train_tiny.make_model(tmp_path / "model")
    return tmp_path / "model"


def edit(directory, **changes):
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def check(directory):
    return table_for(open_model_directory(directory))


def test_a_good_directory_opens(directory):
    opened = open_model_directory(directory)
    assert opened.architecture == "Qwen3ForCausalLM"
    assert check(directory).num_layers == 2
    with opened.reader() as read:
        assert read("model.norm.weight").shape == (32,)


def test_missing_things_are_named(directory, tmp_path):
    cases = [
        (lambda d: shutil.rmtree(d), "no such directory"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
        (lambda d: edit(d, architectures=["A", "B"]), "exactly one class"),
        (lambda d: edit(d, architectures=["GPT2LMHeadModel"]), "must be one of .*LlamaForCausalLM, .*Qwen3ForCausalLM"),
        (lambda d: edit(d, intermediate_size=None), "no key 'intermediate_size'"),
        (lambda d: edit(d, num_key_value_heads=3), "must divide num_attention_heads"),
    ]
    for number, (damage, message) in enumerate(cases):
        copy = tmp_path / str(number)
        shutil.copytree(directory, copy)
        damage(copy)
        with pytest.raises(InputError, match=message):
            check(copy)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_files_are_found_by_their_size(directory, kept):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"complete safetensors file|bytes by its header"):
        check(directory)


def test_garbage_is_no_safetensors_file(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 4096)
    with pytest.raises(InputError, match="complete safetensors file"):
        check(directory)


def test_an_index_that_lies_is_found(directory):
    file = directory / "model.safetensors"
    names = list(open_model_directory(directory).tensors)
    index = directory / INDEX
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "ghost.weight"], file.name)}))
    with pytest.raises(InputError, match=r"ghost.weight.*not stored in model.safetensors"):
        check(directory)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "elsewhere.safetensors")}))
    with pytest.raises(InputError, match=r"the index .* names it"):
        check(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_arithmetic_that_is_not_implemented_is_refused(directory, changes, message):
    edit(directory, **changes)
    with pytest.raises(InputError, match=message):
        check(directory)


def test_both_remainders_are_listed_with_the_nearest_names(directory):
    edit(directory, attention_bias=True)
    with pytest.raises(InputError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.bias"):
        check(directory)
    edit(directory, attention_bias=False, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"not in the table: model\.layers\.1\.input_layernorm\.weight \(nearest: "):
        check(directory)


def test_shapes_are_held_against_the_config(directory):
    edit(directory, intermediate_size=65)
    with pytest.raises(InputError, match=r"shape of model.layers.0.mlp.gate_proj.weight .*\(64, 32\).*\(65, 32\)"):
        check(directory)


def test_a_head_that_is_stored_all_the_same_must_fit(directory):
    edit(directory, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"missing: lm_head.weight"):
        check(directory)
