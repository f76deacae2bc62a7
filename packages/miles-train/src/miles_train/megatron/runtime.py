"""A rank's footing: device, default process group, Megatron's groups, random state.

Megatron reads the default process group everywhere, so the rank's process owns it: one trainer per process.
"""

import argparse
import logging
import os
import random
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed

from miles_train.megatron import cpu_shim
from miles_train.megatron.upstream import model_parallel_cuda_manual_seed, parallel_state


@dataclass(frozen=True, slots=True)
class Address:
    """Where the ranks of one trainer meet.

    Attributes:
        rank: this process, from 0.
        world_size: processes of the trainer.
        master_host: host of rank 0.
        master_port: a free TCP port there; one rank alone needs none.
    """

    rank: int = 0
    world_size: int = 1
    master_host: str = "127.0.0.1"
    master_port: int = 0


def device_of_this_process() -> torch.device:
    """The current GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def on_device(array: "np.ndarray[Any, Any]", device: torch.device) -> torch.Tensor:
    """A copy of an array on the model's device; to a GPU without waiting for what it is doing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor
    # From pageable memory the copy would wait until all earlier kernels have ended.
    return tensor.pin_memory().to(device, non_blocking=True)


def start(args: argparse.Namespace, address: Address, *, deterministic: bool) -> None:
    """Make the default process group and Megatron's groups, and seed everything.

    Args:
        args: Megatron's arguments.
        address: where the ranks meet.
        deterministic: refuse operations whose result depends on timing.

    Raises:
        RuntimeError: the process has a default group already, or the ranks did not meet in
            `distributed_timeout_minutes`.
    """
    _hush()
    if distributed.is_initialized():
        raise RuntimeError("torch.distributed is initialised in this process: a trainer needs a process of its own")
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    with _gloo_as_near_as(address.master_host):
        distributed.init_process_group(
            args.distributed_backend,
            store=_store(address, timeout),
            rank=address.rank,
            world_size=address.world_size,
            timeout=timeout,
        )
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            distributed_timeout_minutes=args.distributed_timeout_minutes,
            create_gloo_process_groups=False,
        )
        if args.distributed_backend != "gloo":
            made: Any = distributed.new_group(backend="gloo", timeout=timeout)  # annotated as an int as well
            _Groups.host = made
    torch.use_deterministic_algorithms(deterministic)
    # As megatron/training/initialize.py, `_set_random_seed`: stages differ, and what differs within one Megatron's
    # tracker keeps apart.
    seed = args.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with cpu_shim.active():
        model_parallel_cuda_manual_seed(seed)


@contextmanager
def _gloo_as_near_as(host: str) -> Iterator[None]:
    """Let groups of ranks that meet on loopback listen there, not where the host's name points.

    The variable is read when a group is made; other groups of this process (weight sync to engines elsewhere) must not
    see it.
    """
    name = "GLOO_SOCKET_IFNAME"
    if host not in ("127.0.0.1", "localhost") or name in os.environ:
        yield
        return
    os.environ[name] = "lo"
    try:
        yield
    finally:
        del os.environ[name]


def _store(address: Address, timeout: timedelta) -> Any:
    if address.world_size == 1:
        return distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # public by its documentation
    if not address.master_port:
        raise ValueError(f"master_port = 0: {address.world_size} ranks need a free TCP port on {address.master_host}")
    where = address.master_host, address.master_port
    is_master = address.rank == 0
    # Left to itself the store listens on every interface of the host.
    listener = socket.create_server(where).detach() if is_master else None
    return distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        *where, address.world_size, is_master=is_master, timeout=timeout, master_listen_fd=listener
    )


def _hush() -> None:
    """Leave out of a trainer's log what upstreams warn of on the one path they leave us.

    Checkpoints: torch warns of its own sharded tensors, which Megatron's format is made of, and of a load without a
        group;
    Megatron advises another writer than its own, which needs a GPU package. Optimizer: gradients of views are looked
    at.
    """
    for message, category in (
        ("Please use DTensor instead", FutureWarning),
        ("torch.distributed is disabled", UserWarning),
        ("The argument order of load", UserWarning),
        ("The .grad attribute of a Tensor that is not a leaf", UserWarning),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)
    writer = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    writer.addFilter(lambda record: not record.getMessage().startswith("MCore's async save is deprecated"))


class _Groups:
    """What `start` made beside Megatron's groups."""

    host: distributed.ProcessGroup | None = None


def host_group() -> distributed.ProcessGroup | None:
    """The group of all ranks that moves tensors in host memory; None where the default group does."""
    return _Groups.host


def stop() -> None:
    """Take down what `start` made; safe to call twice."""
    _Groups.host = None
    if distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


@contextmanager
def others_code() -> Iterator[None]:
    """A context for losses and hooks called from inside Megatron."""
    with cpu_shim.paused():
        yield
