"""The Megatron trainer as a whole: conformance, data parallelism, layouts of memory, bad input."""

import json
import shutil

import numpy as np
import pytest
import train_tiny

from miles_train.conformance import CHECKS
from miles_train.model_dir import open_model_directory

pytestmark = pytest.mark.xdist_group("train-megatron")


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    train_tiny.make_model(path)
    return path


def assert_same_training(weights, expected):
    """Equal up to the order of sums. Adam's first updates divide by the gradient's size: some rounding grows."""
    assert set(weights) == set(expected)
    for name, weight in expected.items():
        difference = np.abs(weights[name] - weight)
        assert difference.max() < 1e-4 and difference.mean() < 1e-6, name


# --- conformance


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_conforms(check, ranks, model_path, tmp_path):
    ranks.run_one("in_rank_trainer.run_check", check, model_path, tmp_path)


# --- data parallelism


def test_two_ranks_learn_as_one_does(ranks, model_path):
    one = ranks.run_one("in_rank_trainer.train", model_path, None)
    two = ranks.run("in_rank_trainer.train", model_path, None, world_size=2)
    assert two[0][0] == two[1][0]  # metrics
    for metrics_one, metrics_two in zip(one[0], two[0][0], strict=True):
        for name in set(metrics_one) - {"gap_shard", "gap_sample"}:
            assert metrics_two[name] == pytest.approx(metrics_one[name], rel=1e-4, abs=1e-6), name
    assert_same_training(two[0][1], one[1])
    for name, weight in two[0][1].items():
        np.testing.assert_array_equal(two[1][1][name], weight)


def test_two_ranks_find_the_largest_gap_where_it_is(ranks, model_path):
    (metrics, _), _ = ranks.run("in_rank_trainer.train", model_path, None, 11, world_size=2)
    # Sample 11 went to shard 1 as its sixth; its last token has the largest gap by far.
    assert [metrics[0][key] for key in ("gap_shard", "gap_sample")] == [1.0, 5.0]
    assert metrics[0]["gap_position"] == train_tiny.batch_of().lengths[11] - 1


def test_two_ranks_resume_bit_for_bit(ranks, model_path, tmp_path):
    ranks.run("in_rank_trainer.check_resume", model_path, tmp_path, world_size=2)


def test_ranks_listen_on_loopback_alone(ranks, model_path):
    one = ranks.run_one("in_rank_trainer.listens_on", model_path)
    two = ranks.run("in_rank_trainer.listens_on", model_path, world_size=2)
    assert set().union(one, *two) == {"127.0.0.1"}


def test_an_idle_rank_changes_nothing(ranks, model_path):
    one = ranks.run_one("in_rank_trainer.train_all_on_rank_0", model_path)
    two = ranks.run("in_rank_trainer.train_all_on_rank_0", model_path, world_size=2)
    assert two[0][0] == two[1][0]
    assert_same_training(two[1][1], one[1])


def test_an_infinite_gradient_stops_every_rank_before_the_update(ranks, model_path):
    for world_size in (1, 2):
        for message, untouched in ranks.run(
            "in_rank_trainer.step_with_infinite_gradient", model_path, world_size=world_size
        ):
            assert "gradient = " in message and "update 1" in message and untouched


# --- settings that change how, not what


@pytest.mark.parametrize(
    "settings",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
        {"make_vocab_size_divisible_by": 128},
    ],
    ids=["recompute-all", "recompute-attention", "padded-vocabulary"],
)
def test_settings_that_change_nothing(settings, ranks, model_path):
    plain, changed = ranks.run_one("in_rank_trainer.train_twice", model_path, settings)
    assert changed[0] == pytest.approx(plain[0], rel=1e-5)
    assert_same_training(changed[1], plain[1])


@pytest.mark.parametrize("how", ["train_in_pieces", "train_in_chunks"])
def test_micro_batches_and_chunks_of_logits_change_nothing(how, ranks, model_path):
    whole, cut = ranks.run_one(f"in_rank_trainer.{how}", model_path)
    assert cut[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)
    assert_same_training(cut[1], whole[1])


def test_bf16_learns_and_exports_bf16(ranks, model_path, tmp_path):
    before, after = ranks.run_one("in_rank_trainer.train_bf16", model_path, tmp_path / "hf")
    assert after > before
    directory = open_model_directory(tmp_path / "hf")
    assert {tensor.dtype for tensor in directory.tensors.values()} == {"BF16"}
    assert directory.config["dtype"] == "bfloat16"


def test_bf16_resumes_bit_for_bit_with_its_main_weights(ranks, model_path, tmp_path):
    ranks.run("in_rank_trainer.check_bf16_resume", model_path, tmp_path / "two", world_size=2)
    ranks.run("in_rank_trainer.check_bf16_resume", model_path, tmp_path / "one")


def test_warm_up_does_not_waste_its_first_update(ranks, model_path):
    metrics, _ = ranks.run_one("in_rank_trainer.train", model_path, {"lr_warmup_iters": 2})
    assert [entry["lr"] for entry in metrics] == pytest.approx([0.0005, 0.001, 0.001])


def test_temperature_divides_logits(ranks, model_path):
    cold, hot = (
        ranks.run_one("in_rank_trainer.logprobs_at", model_path, 1.0),
        ranks.run_one("in_rank_trainer.logprobs_at", model_path, 1e6),
    )
    masked = train_tiny.batch_of().loss_mask
    np.testing.assert_allclose(hot[masked], -np.log(train_tiny.VOCAB), atol=1e-4)
    assert np.abs(cold - hot)[masked].max() > 0.01


# --- checkpoints and exports on disk


def test_checkpoints_are_pruned_and_damage_is_found(ranks, model_path, tmp_path):
    ranks.run_one("in_rank_trainer.save_four", model_path, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-3"]
    assert (tmp_path / "latest").read_text() == "step-3\n"
    shard = next((tmp_path / "step-3" / "megatron").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    message = ranks.run_one("in_rank_trainer.load_fails", model_path, tmp_path)
    assert "step-3 is damaged" in message


def test_what_cannot_be_written_is_an_error_on_every_rank(ranks, model_path, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for errors in ranks.run("in_rank_trainer.fail_to_write", model_path, tmp_path, world_size=2):
        assert len(errors) == 3 and all("could not" in text for text in errors), errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_leftovers_and_older_exports_are_replaced_the_latest_checkpoint_never(ranks, model_path, tmp_path):
    message = ranks.run_one("in_rank_trainer.write_again", model_path, tmp_path)
    assert "exists" in message
    assert (tmp_path / "latest").read_text() == "b\n"
    assert json.loads((tmp_path / "b" / "trainer.json").read_text())["state"] == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "hf", "latest"]


def test_an_export_in_shards_is_what_transformers_loads(ranks, model_path, tmp_path):
    ours, theirs = ranks.run_one("in_rank_reference.export_and_compare", model_path, tmp_path)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    names = {path.name for path in (tmp_path / "sharded").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert sum(name.endswith(".safetensors") for name in names) > 2


# --- hooks, settings, directories


def test_hooks_are_called_with_what_they_take(ranks, model_path):
    calls = ranks.run_one("in_rank_trainer.record_hooks", model_path)
    assert calls == [
        ("after_model_init", ["DistributedDataParallel"]),
        ("before_train_step", 12),
        ("after_train_step", True),
        ("before_logprobs", 17),
        ("before_train_step", 17),
        ("after_train_step", True),
    ]


def test_bad_settings_and_directories_start_nothing(ranks, model_path, tmp_path):
    llama = tmp_path / "mamba"
    shutil.copytree(model_path, llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    cases = [
        (model_path, {"lrr": 1.0}, "Did you mean lr?"),
        (model_path, {"lr_decay_style": "linear", "lr_decay_iters": 5, "min_lr": 1.0}, "Megatron refuses"),
        (tmp_path / "nowhere", {}, "no such directory"),
        (llama, {}, "must be one of "),
    ]
    for path, settings, expected in cases:
        message, started = ranks.run_one("in_rank_trainer.fails_to_start", path, settings)
        assert expected in message and not started, message
