"""Every layout of ranks computes what one rank does: logprobs within 1e-5, and the same update."""

import numpy as np
import pytest
import train_tiny
from layout_checks import LAYOUTS, assert_layouts_agree, of_shard

from miles_core.errors import InputError
from miles_train.megatron.layout import Layout, check_layout, read_layout

pytestmark = pytest.mark.xdist_group("train-megatron")

# 17 tokens: tensor-parallel ranks pad them, and one of four holds padding alone. 4 layers, for virtual stages.
DENSE = {"num_hidden_layers": 4, "vocab_size": 17, "attention_bias": True}
MOE = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_key_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "tied"
    train_tiny.make_model(path, **DENSE)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    path = tmp_path_factory.mktemp("experts") / "untied"
    train_tiny.make_model(path, **MOE)
    return path


def test_dense_on_two_ranks(ranks, dense):
    assert_layouts_agree(ranks, dense, "dp2", "tp2", "tp2-whole-sequences", "pp2", "pp2-vp2", "pp2-uneven", "cp2")


def test_dense_on_four_ranks(ranks, dense):
    assert_layouts_agree(ranks, dense, "dp2-tp2", "tp2-pp2-vp2", "tp2-cp2", "pp2-cp2")


def test_experts_on_two_ranks(ranks, experts):
    assert_layouts_agree(ranks, experts, "pp2", "ep2", "etp2", "tp2-ep2-etp1", "cp2-ep2")


def test_experts_on_four_ranks(ranks, experts):
    assert_layouts_agree(ranks, experts, "tp2-ep2", "pp2-ep2")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tp2-whole-sequences"])
def test_every_layout_of_experts(name, ranks, experts):
    assert_layouts_agree(ranks, experts, name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "ep" not in name and "etp" not in name])
def test_every_layout_of_a_dense_model_of_odd_sizes(name, ranks, tmp_path):
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6, "hidden_size": 28}
    train_tiny.make_model(tmp_path / "odd", **DENSE, **sizes, intermediate_size=20)
    assert_layouts_agree(ranks, tmp_path / "odd", name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_layers", "world_size", "stages"),
    [
        (5, 2, {"pipeline_model_parallel_layout": "Et|tt|t|tL"}),
        (5, 2, {"pipeline_model_parallel_layout": "Et|t*4L"}),
        (6, 2, {"num_virtual_stages_per_pipeline_rank": 2, "decoder_last_pipeline_num_layers": 2}),
        (8, 4, {"num_virtual_stages_per_pipeline_rank": 2}),
    ],
)
def test_stages_of_any_size(num_layers, world_size, stages, ranks, tmp_path):
    train_tiny.make_model(tmp_path / "tiny", **{**DENSE, "num_hidden_layers": num_layers})
    layout = world_size, {"pipeline_model_parallel_size": world_size, **stages}
    assert_layouts_agree(ranks, tmp_path / "tiny", layout)


# --- what else a step must withstand


def test_a_shard_may_be_empty(ranks, dense, experts):
    assert_layouts_agree(ranks, dense, "dp2-pp2", first_takes_all=True)
    assert_layouts_agree(ranks, experts, "ep2", first_takes_all=True)


@pytest.mark.parametrize("name", ["tp2-pp2", "pp2-ep2"])
def test_not_a_number_stops_every_rank_before_the_update(name, ranks, experts):
    world_size, settings = LAYOUTS[name]
    for message, untouched, (after, fresh) in ranks.run(
        "in_rank_layouts.stop", experts, settings, world_size=world_size
    ):
        assert "loss = nan in update 1" in message and untouched
        assert after == fresh, "the error left something behind"


@pytest.mark.long
@pytest.mark.parametrize("name", ["tp2-pp2-vp2", "tp2-cp2"])
def test_recomputed_activations_change_nothing(name, ranks, dense):
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert_layouts_agree(ranks, dense, name, settings=recompute)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tp2-pp2-vp2", "dp2-pp2", "tp2-ep2", "ep4"])
def test_packed_rows_change_nothing(name, ranks, experts):
    assert_layouts_agree(ranks, experts, name, packed=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["tp2-pp2", "dp2-tp2", "tp2-cp2", "pp2-ep2", "tp2-ep2"])
def test_bf16_stays_close_to_float32(name, ranks, experts):
    (_, logprobs, expected, _) = ranks.run_one("in_rank_layouts.run", experts, {})
    world_size, layout = LAYOUTS[name]
    results = ranks.run("in_rank_layouts.run", experts, {"bf16": True, **layout}, world_size=world_size)
    for (shard, num_shards), ours, metrics, _ in results:
        assert np.abs(ours - of_shard(logprobs, shard, num_shards)).max() < 0.05
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)


# --- rules, before anything starts


def test_ranks_of_one_copy_bring_one_shard():
    layout = read_layout({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 8)
    assert [layout.shard_of(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    layout = read_layout({"context_parallel_size": 2}, 6)
    assert (layout.num_shards, [layout.shard_of(rank) for rank in range(6)]) == (3, [0, 0, 1, 1, 2, 2])
    assert read_layout({}, 3) == Layout(3) and Layout(3).num_shards == 3


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        ({"tensor_model_parallel_size": 0}, 2, "must be at least 1"),
        ({"tensor_model_parallel_size": 2}, 3, "train.num_ranks = 3.*multiple of tensor_model_parallel_size = 2"),
        ({"pipeline_model_parallel_size": 2, "context_parallel_size": 2}, 6, "4 ranks"),
        ({"expert_model_parallel_size": 4}, 2, "multiple of .*expert_model_parallel_size = 4"),
        ({"tensor_model_parallel_size": 3}, 3, "must divide num_attention_heads = 4"),
        ({"tensor_model_parallel_size": 4}, 4, "must divide num_key_value_heads = 2"),
        ({"expert_model_parallel_size": 3}, 3, "must divide num_experts = 4"),
        ({"expert_tensor_parallel_size": 3}, 3, "must divide moe_intermediate_size = 32"),
        ({"pipeline_model_parallel_size": 3}, 3, "must divide num_hidden_layers = 4.*decoder_first_pipeline"),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3},
            2,
            "must divide the 2 layers of a pipeline stage",
        ),
        ({"num_virtual_stages_per_pipeline_rank": 2}, 2, "has no effect: pipeline_model_parallel_size = 1"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": False}, 2, "must be true: Megatron trains experts"),
    ],
)
def test_a_layout_that_does_not_fit_is_one_error(settings, world_size, message):
    with pytest.raises(InputError, match=message):
        check_layout(settings, world_size, {**train_tiny.CONFIG, **MOE, "num_key_value_heads": 2})


def test_sizes_are_looked_up_in_the_text_part():
    with pytest.raises(InputError, match="num_hidden_layers = 4"):
        check_layout({"pipeline_model_parallel_size": 3}, 3, {"text_config": {**train_tiny.CONFIG, **DENSE}})


def test_experts_need_a_model_that_has_some():
    with pytest.raises(InputError, match="must be 1: the model has no experts"):
        check_layout({"expert_model_parallel_size": 2}, 2, train_tiny.CONFIG)
