"""What a loss sees is the same however a step is cut, packed or spread over ranks."""

import numpy as np
import pytest
import train_tiny

pytestmark = pytest.mark.xdist_group("train-megatron")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    train_tiny.make_model(path)
    return path


@pytest.mark.parametrize("name", ["dpo", "gspo"])
def test_a_loss_over_samples_or_groups_is_the_same_however_a_step_is_cut(name, ranks, model_path):
    whole, weights = ranks.run_one("in_rank_losses.step", model_path, name, {}, {})
    cut = ranks.run_one("in_rank_losses.step", model_path, name, {}, {"micro_batch_tokens": 30})
    spread = ranks.run("in_rank_losses.step", model_path, name, {}, {"micro_batch_tokens": 30}, world_size=2)[0]
    shared = ranks.run("in_rank_losses.step", model_path, name, {"context_parallel_size": 2}, {}, world_size=2)[0]
    for metrics, others in (cut, spread, shared):
        for key in set(whole) - {"gap_max", "gap_shard", "gap_sample", "gap_position"}:
            assert metrics[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key
        for key, tensor in weights.items():
            # Up to the order of sums: Adam's first update divides by the gradient's size.
            difference = np.abs(others[key] - tensor)
            assert difference.max() < 1e-4 and difference.mean() < 1e-6, key
