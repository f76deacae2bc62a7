import math
from collections.abc import Callable

import numpy as np
import pytest

from miles_core import Group, Prompt, Sample, VersionSpan
from miles_core.observe import rollout_metrics


def test_two_groups_by_hand(make_sample: Callable[..., Sample]):
    def sample(reward: float, length: int, version: int, **changes: object) -> Sample:
        spans = (VersionSpan(2, 2 + length, version),)
        return make_sample(response_len=length, reward=reward, version_spans=spans, **changes)

    right = {"reward_parts": {"exact": 1.0, "format": 0.5}}
    wrong = {"reward_parts": {"exact": 0.0}}
    mixed = Group(Prompt("a", "x"), (sample(1, 4, 7, **right), sample(0, 2, 5, **wrong)))
    equal = Group(Prompt("b", "x"), (sample(0, 6, 7, finish_reason="length", **wrong), sample(0, 8, 7, **wrong)))
    assert rollout_metrics([mixed, equal], weight_version=8) == {
        "rollout/reward": 0.25,
        "rollout/reward_std": pytest.approx(math.sqrt(3) / 4),
        "rollout/exact": 0.25,
        "rollout/format": 0.5,
        "rollout/response_len": 5.0,
        "rollout/response_len_max": 8,
        "rollout/truncated": 0.25,
        "rollout/zero_variance_groups": 1,
        "rollout/staleness_mean": 1.5,
        "rollout/staleness_max": 3,
        "rollout/num_groups": 2,
        "rollout/num_samples": 4,
    }


def test_a_part_of_the_reward_never_hides_a_metric(make_sample: Callable[..., Sample]):
    group = Group(Prompt("a", "x"), (make_sample(reward=0.5, reward_parts={"reward": 9.0, "num_samples": 9.0}),))
    metrics = rollout_metrics([group], 3)
    assert metrics["rollout/reward"] == 0.5 and metrics["rollout/num_samples"] == 1


def test_no_groups_are_counted_as_none():
    assert rollout_metrics([], 0) == {"rollout/num_groups": 0, "rollout/num_samples": 0}


def test_only_plain_numbers_come_out(make_group: Callable[..., Group]):
    metrics = rollout_metrics([make_group([3, 2], [np.float32(0.5), 1])], 3)  # type: ignore[list-item]
    assert {type(value) for value in metrics.values()} <= {int, float}
