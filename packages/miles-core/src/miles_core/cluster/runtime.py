"""Starting Ray on this machine, closed to everybody else, or joining a cluster that runs."""

import atexit
import logging
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from miles_core.cluster._ray import ray
from miles_core.cluster.plan import Cluster, Node
from miles_core.errors import ClusterDied, InputError, MilesError
from miles_core.ports import LOOPBACK, port_is_free

# Samples and batches pass through the object store, weights never do: 256 MiB holds hundreds of steps of small runs.
LOCAL_OBJECT_STORE_BYTES = 256 << 20


@contextmanager
def ray_cluster(address: str = "", num_cpus: float = 4, dashboard_port: int = 8265) -> Generator[Cluster]:
    """Run the body with Ray connected; on leaving, everything that was started here is stopped.

    Args:
        address: a running cluster ("auto", "host:port"); empty starts one on this machine, on loopback, with a token of
            its own that every connection must show.
        num_cpus: logical CPUs of a cluster started here.
        dashboard_port: loopback port of the dashboard of a cluster started here; 0 leaves it out.

    Yields:
        The cluster's nodes and what they have.

    Raises:
        InputError: the dashboard's port is taken, or no cluster answers at `address`.
    """
    if address:
        _join(address)
    else:
        _start(num_cpus, dashboard_port)
    try:
        yield Cluster(tuple(sorted(_nodes(), key=lambda node: node.name)))
    except ClusterDied:
        # Shutting down would wait a minute for who is not there. What is left of Ray is for the warden.
        atexit.unregister(ray.shutdown)
        raise
    except BaseException:
        ray.shutdown()
        raise
    ray.shutdown()


def _join(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise InputError(
            "cluster.address", address, f"no Ray cluster answers there ({error})", "Start one, or leave the key out."
        ) from None


def _start(num_cpus: float, dashboard_port: int) -> None:
    if dashboard_port and not port_is_free(dashboard_port):
        raise InputError(
            "cluster.dashboard_port",
            dashboard_port,
            "the port is taken on this machine",
            "Use --set cluster.dashboard_port=0 for none, or another port.",
        )
    logging.getLogger("ray").setLevel(logging.ERROR)  # deaths are ours to name, once
    try:
        _init_local(num_cpus, dashboard_port)
    except Exception as error:
        # Ray raises the bare class here, e.g. when a busy machine does not start its processes within a minute.
        raise MilesError(f"Ray could not start on this machine: {error}") from error


def _init_local(num_cpus: float, dashboard_port: int) -> None:
    ray.init(
        num_cpus=num_cpus,
        include_dashboard=bool(dashboard_port),
        dashboard_host=LOOPBACK,
        dashboard_port=dashboard_port or None,
        _node_ip_address=LOOPBACK,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=str(Path(tempfile.gettempdir()) / f"miles-ray-{os.getuid()}"),
    )


def _nodes() -> Iterator[Node]:
    for node in ray.nodes():
        if node["Alive"]:
            resources: dict[str, float] = node["Resources"]
            yield Node(node["NodeID"], resources.get("CPU", 0), int(resources.get("GPU", 0)))
