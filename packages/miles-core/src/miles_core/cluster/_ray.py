"""The one place where ray is imported: its absence has one message, and its door is closed before it opens.

Ray reads these variables when it is imported, and its children inherit them. What the user has set is respected: to
join a cluster that runs without tokens, set RAY_AUTH_MODE=disabled. Typed Any: ray's own types are partial.
"""

import os
import secrets
from typing import Any

from miles_core.cluster.plan import ACROSS_MACHINES

os.environ.setdefault("RAY_AUTH_MODE", "token")
if os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Everything that Ray starts on this machine binds to loopback, its Prometheus exporters (no token) included. Ray has
# this switch for desktops (services.get_node_ip_address); a process that joins a cluster must set it to 1.
os.environ.setdefault(ACROSS_MACHINES, "0")
# Under `uv run` Ray would pack the working directory for its workers and start each through uv again; they are to run
# in the environment that is there.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
# Else Ray hides GPUs from actors that ask for none by emptying CUDA_VISIBLE_DEVICES, and warns about it at every start.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

try:
    import ray as _ray
    from ray.util import placement_group as _placement_group
    from ray.util import remove_placement_group as _remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as _Strategy
except ImportError as error:
    raise ImportError('miles_core.cluster needs Ray: pip install "miles-core[ray]"') from error

ray: Any = _ray
placement_group: Any = _placement_group
remove_placement_group: Any = _remove_placement_group
PlacementGroupSchedulingStrategy: Any = _Strategy

__all__ = ["PlacementGroupSchedulingStrategy", "placement_group", "ray", "remove_placement_group"]
