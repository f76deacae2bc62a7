"""The one place where ray is imported, so that its absence has one message. Typed Any: ray's own types are partial."""

from typing import Any

try:
    import ray as _ray
    import ray.util.placement_group as _placement_group
    import ray.util.scheduling_strategies as _scheduling_strategies
except ImportError as error:
    raise ImportError('miles_core.cluster needs Ray: pip install "miles-core[ray]"') from error

ray: Any = _ray
placement_group: Any = _placement_group.placement_group
remove_placement_group: Any = _placement_group.remove_placement_group
PlacementGroupSchedulingStrategy: Any = _scheduling_strategies.PlacementGroupSchedulingStrategy

__all__ = ["PlacementGroupSchedulingStrategy", "placement_group", "ray", "remove_placement_group"]
