"""Placing and supervising the processes of a run. The only room that knows Ray (extra `miles-core[ray]`)."""

from miles_core.cluster.plan import Cluster, Node, Plan, Role, Slot, place

__all__ = ["Cluster", "Node", "Plan", "Role", "Slot", "place"]
