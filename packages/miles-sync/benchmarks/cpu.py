"""Shared memory and gloo on one machine, against a plain memcpy in the same run. Prints one JSON object."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from miles_sync import ModuleReceiver, ReceiverTarget, WeightSync, serve
from miles_sync.digest import digest_of

TOKEN = "the token of this benchmark"


def _model(gigabytes: float) -> torch.nn.Module:
    """Layers of 16 MiB, as many as fit."""
    count = max(1, round(gigabytes * 1e9 / (1 << 24)))
    return torch.nn.ParameterList(torch.nn.Parameter(torch.rand(1 << 22)) for _ in range(count))


def _receive(gigabytes: float, ready: Connection) -> None:
    torch.set_num_threads(1)
    with serve(ModuleReceiver(_model(gigabytes)), token=TOKEN) as server:
        ready.send(server.port)
        server.wait()


def _median_s(act: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = _model(args.gigabytes)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    flat = torch.zeros(nbytes, dtype=torch.uint8)
    other = torch.zeros_like(flat)
    result: dict[str, object] = {
        "bytes": nbytes,
        "memcpy_gb_per_s": nbytes / _median_s(lambda: other.copy_(flat), args.repeats) / 1e9,
        "digest_gb_per_s": nbytes / _median_s(lambda: digest_of(flat, ""), args.repeats) / 1e9,
    }
    context = multiprocessing.get_context("spawn")
    for transport in ("shm", "gloo"):
        ours, theirs = context.Pipe()
        child = context.Process(target=_receive, args=(args.gigabytes, theirs), daemon=True)
        child.start()
        target = ReceiverTarget("127.0.0.1", ours.recv())
        with WeightSync([target], token=TOKEN, transport=transport) as sync:
            reports = [sync.push(model, version).as_dict() for version in range(args.repeats + 1)]
        child.kill()
        child.join()
        keys = [key for key in reports[0] if key.endswith("_s")]
        result[transport] = {
            "first_total_s": reports[0]["total_s"],
            **{key: statistics.median(float(report[key]) for report in reports[1:]) for key in keys},
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
