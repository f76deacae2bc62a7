"""How a receiver opens what a sender tells it to, and what it says about its reach beforehand."""

from __future__ import annotations

import torch

from miles_sync.channel import Deadline
from miles_sync.errors import TransportError
from miles_sync.messages import Attach
from miles_sync.transports import Hear, Inlet
from miles_sync.transports import ipc as ipc_transport
from miles_sync.transports import nccl as nccl_transport
from miles_sync.transports.gloo import GlooInlet
from miles_sync.transports.ipc import IpcInlet
from miles_sync.transports.nccl import NcclInlet
from miles_sync.transports.shm import ShmInlet


def open_inlet(message: Attach, device: torch.device, local_host: str, deadline: Deadline, hear: Hear) -> Inlet:
    """Open a transport for weights on `device`, in a process that the sender reaches at `local_host`."""
    match message.kind:
        case "shm":
            return ShmInlet(message.address)
        case "gloo":
            return GlooInlet(message.address, message.detail, local_host, deadline)
        case "nccl":
            return NcclInlet(message.address, message.detail, device, deadline, hear)
        case "ipc":
            return IpcInlet(message.address, message.detail, device)
        case other:
            raise TransportError(f"transport {other!r} is not known here", stage="transfer")


def reach(device: torch.device) -> tuple[str, tuple[str, ...], str]:
    """What a process with weights on `device` can use: its device, the GPUs it sees, and why not NCCL.

    Does not initialise CUDA for weights in host memory.
    """
    if device.type != "cuda":
        return "cpu", (), f"weights are on {device.type}"
    return ipc_transport.uuid_of(device), tuple(ipc_transport.uuids()), nccl_transport.reason_against()
