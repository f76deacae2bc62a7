"""TCP ports of this machine: whether one is free, and one that is."""

import random
import socket

LOOPBACK = "127.0.0.1"
# Below the ports that the kernel hands out to outgoing connections (32768 and up).
SERVER_PORTS = range(20000, 32000)


def port_is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str = LOOPBACK) -> int:
    """A port of `SERVER_PORTS` that nobody listens on now.

    Raises:
        OSError: none of two hundred tried at random is free.
    """
    for port in random.SystemRandom().sample(SERVER_PORTS, 200):
        if port_is_free(port, host):
            return port
    raise OSError(f"no free port found on {host} between {SERVER_PORTS.start} and {SERVER_PORTS.stop}")
