"""Llama and SmolLM2: every flag and every rotary embedding give what transformers computes."""

import pytest
import train_tiny
from families_line import BASE, LLAMA3, LONGROPE, YARN, YARN_MSCALE, rope
from family_checks import assert_agrees

from miles_core.errors import InputError
from miles_train.megatron.weights import llama, table_for
from miles_train.model_dir import open_model_directory

pytestmark = pytest.mark.xdist_group("train-megatron")
CASES = {
    "llama-3-rope-and-biases": {**LLAMA3, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    # Nine heads over three groups and a tied head, as SmolLM2-135M has them.
    "smollm2": {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
}
LONG = {
    "plain": {},
    "linear": rope("linear", factor=2.5),
    "dynamic": rope("dynamic", factor=4.0),
    "yarn": YARN,
    "yarn-mscale": YARN_MSCALE,
    "yarn-attention-factor": rope("yarn", factor=4.0, attention_factor=1.7),
    "longrope": LONGROPE,
    "longrope-factor": {"rope_parameters": {**LONGROPE["rope_parameters"], "factor": 8.0, "attention_factor": 0.8}},
    "proportional": rope("proportional", partial_rotary_factor=0.5),
    "odd": {
        "hidden_size": 30,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 37,
        "num_hidden_layers": 5,
        "vocab_size": 23,
        "head_dim": 14,
        "tie_word_embeddings": True,
    },
    "every-head-its-own-key": {"num_key_value_heads": None, "hidden_act": "swish", "attention_bias": True},
    "one-layer": {"num_hidden_layers": 1, "mlp_bias": True, "head_dim": 2, "rms_norm_eps": 1e-3},
    "padding-token-tied": {"pad_token_id": 5, "tie_word_embeddings": True},
    "all-biases-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}
# config.json as transformers 4 wrote it: what is not there, and what is.
SPELLINGS = {
    "theta-beside": (["rope_parameters"], {"rope_theta": 300.0}),
    "scaling-beside": (["rope_parameters"], {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "no-scaling": (["rope_parameters"], {"rope_theta": 300.0, "rope_scaling": None, "pretraining_tp": 1}),
    "both-spellings": ([], {"rope_theta": 300.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "defaults": (["rope_parameters", "attention_bias", "mlp_bias", "rms_norm_eps", "head_dim"], {}),
    "length-beside": (
        ["rope_parameters"],
        {"original_max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "llama", {**BASE, **CASES[name]})


def test_a_padded_vocabulary_changes_nothing(ranks, tmp_path):
    settings = {"make_vocab_size_divisible_by": 128}
    assert_agrees(ranks, tmp_path / "hf", "llama", {**BASE, "tie_word_embeddings": True}, settings=settings)


def test_the_padding_token_is_not_learnt_as_input(ranks, tmp_path):
    assert_agrees(ranks, tmp_path / "hf", "llama", {**BASE, "pad_token_id": 3})


def test_attention_to_what_follows_is_refused(tmp_path):
    train_tiny.make_model(tmp_path / "hf", is_causal=False)
    with pytest.raises(InputError, match=r"is_causal .* must be true"):
        table_for(open_model_directory(tmp_path / "hf"))


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_more_of_llama_is_that_of_transformers(ranks, tmp_path, name):
    assert_agrees(ranks, tmp_path / "hf", "llama", {**BASE, **LONG[name]})


@pytest.mark.long
@pytest.mark.parametrize("name", SPELLINGS)
def test_older_config_files_mean_the_same(ranks, tmp_path, name):
    without, added = SPELLINGS[name]
    assert_agrees(ranks, tmp_path / "hf", "llama", BASE, without=without, added=added)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_stored_in_half_precision_agree(ranks, tmp_path, dtype):
    assert_agrees(ranks, tmp_path / "hf", "llama", {**BASE, "num_hidden_layers": 3}, dtype=dtype)


def test_sequences_beyond_the_embedding_are_refused(ranks, tmp_path):
    values = {**BASE, "rope_parameters": {**LONGROPE["rope_parameters"], "original_max_position_embeddings": 4}}
    ranks.run_one("in_rank_reference.make_reference_model", tmp_path / "hf", "llama", values)
    with pytest.raises(AssertionError, match=r"sequence length = \d+: must be at most 4"):
        ranks.run_one("in_rank_reference.compare_with_transformers", tmp_path / "hf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act of the model = 'gelu': only 'silu' or 'swish'"),
        ({"num_key_value_heads": 3}, r"must divide num_attention_heads = 4"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"only full attention is computed here"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, r"rope_scaling.rope_type in config.json = 'su'"),
        (rope("yarn"), r"rope_parameters.factor in config.json = None: is needed"),
        (rope("default", partial_rotary_factor=0.5), r"partial_rotary_factor in config.json = 0.5: must be 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"must be one embedding for all layers"),
        ({"head_dim": 7}, r"head_dim in config.json = 7: leaves 7 channels"),
        (
            rope("longrope", short_factor=[1.0], long_factor=[1.0]),
            r"short_factor in config.json = '1 values': must be 4",
        ),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        llama.read_config({**BASE, **values})
