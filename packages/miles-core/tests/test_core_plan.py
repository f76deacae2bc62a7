"""Placement: a pure function."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import InputError
from miles_core.cluster import Cluster, Node, Role, place


def test_slots_and_bundles_of_a_small_run():
    plan = place(Cluster((Node("here", 4),)), [Role("trainer", 2), Role("engine", 1, num_cpus=0.5)])
    assert [(slot.role, slot.index, slot.node) for slot in plan.slots] == [
        ("trainer", 0, "here"),
        ("trainer", 1, "here"),
        ("engine", 0, "here"),
    ]
    assert plan.bundles == [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 0.5}]
    assert [slot.index for slot in plan.of("trainer")] == [0, 1]


def test_gpu_roles_come_first_whatever_the_order():
    cluster = Cluster((Node("gpu", 1, 1), Node("cpu", 4)))
    plan = place(cluster, [Role("worker", 1), Role("engine", 1, num_gpus=1)])
    assert {slot.role: slot.node for slot in plan.slots} == {"engine": "gpu", "worker": "cpu"}
    assert plan.bundles[1] == {"CPU": 1.0, "GPU": 1}


def test_what_does_not_fit_is_named_with_what_is_left():
    with pytest.raises(InputError, match=r"trainer\[2\] = '1 CPUs, 0 GPUs': does not fit .* here: 0 CPUs, 0 GPUs"):
        place(Cluster((Node("here", 2),)), [Role("trainer", 3)])


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=4),
)
def test_no_node_gives_more_than_it_has(nodes: list[tuple[int, int]], roles: list[tuple[int, int, int]]):
    cluster = Cluster(tuple(Node(f"n{i}", cpus, gpus) for i, (cpus, gpus) in enumerate(nodes)))
    wanted = [Role(f"r{i}", count, cpus, gpus) for i, (count, cpus, gpus) in enumerate(roles)]
    try:
        plan = place(cluster, wanted)
    except InputError:
        return
    assert len(plan.slots) == sum(role.count for role in wanted)
    for node in cluster.nodes:
        here = [slot for slot in plan.slots if slot.node == node.name]
        assert sum(slot.num_cpus for slot in here) <= node.num_cpus
        assert sum(slot.num_gpus for slot in here) <= node.num_gpus
