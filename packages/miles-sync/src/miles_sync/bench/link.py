"""What the hardware does by itself: copies within and between devices, torch's own broadcast."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

MIB = 1 << 20
_BROADCAST_S = 90.0


def settle(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(act: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds that a call takes, the best of several, on a device each of ten in a row."""
    calls = 10 if device.type == "cuda" else 1
    act()
    settle(device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            act()
        settle(device)
        best = min(best, time.perf_counter() - start)
    return best / calls


def rate(act: Callable[[], object], nbytes: int, device: torch.device, repeats: int = 5) -> float:
    """The same in GB/s."""
    return nbytes / best_s(act, device, repeats) / 1e9


def host_rates(nbytes: int, repeats: int) -> dict[str, float]:
    """One thread's copy and read of so many bytes of host memory, in GB/s."""
    host = torch.device("cpu")
    one, other = torch.zeros(nbytes // 8, dtype=torch.int64), torch.ones(nbytes // 8, dtype=torch.int64)
    return {
        "memcpy_gb_per_s": rate(lambda: other.copy_(one), one.nbytes, host, repeats),
        "read_gb_per_s": rate(one.sum, one.nbytes, host, repeats),
    }


def device_rates(trainer: torch.device, engine: torch.device, mib: int) -> dict[str, float]:
    """Copies of so many MiB on a GPU, and from one to another where there are two, in GB/s."""
    one = torch.zeros(mib * MIB, dtype=torch.uint8, device=trainer)
    near = torch.empty_like(one)
    found = {f"device_memcpy_{mib}_mib_gb_per_s": rate(functools.partial(near.copy_, one), one.nbytes, trainer)}
    if engine != trainer:
        far = torch.empty_like(one, device=engine)
        found[f"peer_copy_{mib}_mib_gb_per_s"] = rate(functools.partial(far.copy_, one), one.nbytes, trainer)
    return found


def broadcast_rates(mibs: Sequence[int]) -> dict[str, float]:
    """NCCL through torch, by two processes that do nothing else, on GPUs 0 and 1: GB/s by length."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "miles_sync", "link", "--port", str(port), "--mib", *map(str, mibs), "--rank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)
    ]
    try:
        return json.loads(ranks[0].communicate(timeout=_BROADCAST_S)[0].splitlines()[-1])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(20)


def run_broadcast(rank: int, port: int, mibs: Sequence[int]) -> None:
    """Be one of those two processes: the only ones with a default process group."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for mib in mibs:
        data = torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")
        found[f"{mib}_mib"] = rate(functools.partial(dist.broadcast, data, 0), data.nbytes, data.device)
    if rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()
