"""The router chooses and weighs as transformers does, ties included, and obeys Megatron's replay."""

import pytest

pytestmark = pytest.mark.xdist_group("train-megatron")
SOFTMAX = [
    {"num_experts": experts, "top_k": chosen, "normalize": normalize}
    for experts, chosen, normalize in [
        (4, 2, True),
        (4, 2, False),
        (4, 1, True),
        (9, 9, True),
        (64, 8, False),
        (1, 1, True),
    ]
]
SIGMOID = [
    {"num_experts": experts, "top_k": chosen, "num_groups": groups, "top_groups": taken, **more}
    for experts, chosen, groups, taken, more in [
        (8, 2, 1, 1, {}),
        (8, 3, 4, 2, {"has_bias": True}),
        (8, 1, 4, 2, {"has_bias": True, "scaling": 2.5}),
        (9, 5, 3, 2, {"normalize": False}),
        (64, 8, 8, 4, {"has_bias": True, "scaling": 2.5}),
        (64, 6, 8, 3, {"has_bias": True, "normalize": False}),
        (12, 12, 6, 6, {}),
        (12, 2, 6, 1, {"has_bias": True}),
    ]
]


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_routes_are_those_of_transformers(ranks, ties):
    cases = [*SOFTMAX, *({"score": "sigmoid", **values} for values in SIGMOID)]
    ranks.run_one("in_rank_moe.check_routes", cases, ties)


def test_recorded_choices_can_be_replayed(ranks):
    ranks.run_one("in_rank_moe.check_replay")


def test_the_experts_bias_is_never_cast(ranks):
    ranks.run_one("in_rank_moe.check_bias_stays")
