"""Placing and supervising the processes of a run. The only room that knows Ray (extra `miles-core[ray]`)."""

from miles_core.cluster.plan import ACROSS_MACHINES, Cluster, Node, Plan, Role, Slot, place

__all__ = ["ACROSS_MACHINES", "Cluster", "Node", "Plan", "Role", "Slot", "place"]
