"""Placement as a pure function: a cluster and the roles of a run in, a slot for every process out.

Nothing here touches Ray; `miles_core.cluster.actors` turns a plan into one placement group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from miles_core.errors import InputError

# Ray's environment variable for a cluster of more than this machine; must be "1" before ray is imported to join one.
ACROSS_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, slots=True)
class Node:
    """One machine.

    Attributes:
        name: its address.
        num_cpus: logical CPUs that may be given away; on a laptop more than it has cores, since roles take turns.
        num_gpus: GPUs.
    """

    name: str
    num_cpus: float
    num_gpus: int = 0


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a run."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Role:
    """A kind of process and what each of them needs.

    Attributes:
        name: "trainer", "engine", "worker", "queue".
        count: how many of them.
        num_cpus: logical CPUs of each.
        num_gpus: GPUs of each.
    """

    name: str
    count: int
    num_cpus: float = 1.0
    num_gpus: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one process goes."""

    role: str
    index: int
    node: str
    num_cpus: float
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A slot for every process; slots of a role are in the order of their index."""

    slots: tuple[Slot, ...]

    def of(self, role: str) -> tuple[Slot, ...]:
        """The slots of one role."""
        return tuple(slot for slot in self.slots if slot.role == role)

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Resources of each slot, as Ray's placement groups want them."""
        return [{"CPU": s.num_cpus} | ({"GPU": s.num_gpus} if s.num_gpus else {}) for s in self.slots]


def place(cluster: Cluster, roles: Sequence[Role]) -> Plan:
    """Give every process a node: GPU roles first, processes of a role side by side, nodes filled in order.

    Raises:
        InputError: a process fits on no node; says which, and what is left.
    """
    free = {node.name: [node.num_cpus, node.num_gpus] for node in cluster.nodes}
    placed: dict[str, list[Slot]] = {role.name: [] for role in roles}
    for role in sorted(roles, key=lambda role: -role.num_gpus):
        for index in range(role.count):
            node = next(
                (n for n, (cpus, gpus) in free.items() if cpus >= role.num_cpus and gpus >= role.num_gpus), None
            )
            if node is None:
                left = ", ".join(f"{n}: {cpus:g} CPUs, {gpus:g} GPUs" for n, (cpus, gpus) in free.items())
                raise InputError(
                    f"{role.name}[{index}]",
                    f"{role.num_cpus:g} CPUs, {role.num_gpus} GPUs",
                    f"does not fit on any node (left: {left})",
                    "Use fewer processes or a larger cluster.",
                )
            free[node][0] -= role.num_cpus
            free[node][1] -= role.num_gpus
            placed[role.name].append(Slot(role.name, index, node, role.num_cpus, role.num_gpus))
    return Plan(tuple(slot for role in roles for slot in placed[role.name]))
