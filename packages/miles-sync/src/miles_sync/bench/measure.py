"""One case measured: pushes of a model from this process to an engine in another, from begin to commit acknowledged."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from miles_sync.bench.link import settle
from miles_sync.bench.process import engine
from miles_sync.bench.shapes import change, fill, random_tensors
from miles_sync.manifest import TensorMeta
from miles_sync.messages import Mode
from miles_sync.receivers import fingerprint
from miles_sync.routes import Transport
from miles_sync.shared import SharedArena
from miles_sync.sources import NamedTensors
from miles_sync.sync import WeightSync
from miles_sync.targets import ReceiverTarget

Result = dict[str, Any]
_HOST = torch.device("cpu")
Way = Transport | Literal["arena"]
"""A transport, or "arena": shared memory in which the trainer's weights live already."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        transport: By which the weights go.
        mode: How they are received.
        digest: Whether they are digested.
        trainer: Where they come from.
        engine: Where they go.
        bucket_bytes: Length of a bucket, None for the default.
        deadline_s: Bound on every wait.
    """

    transport: Way
    mode: Mode = "in_place"
    digest: bool = True
    trainer: torch.device = _HOST
    engine: torch.device = _HOST
    bucket_bytes: int | None = None
    deadline_s: float = 40.0

    @property
    def name(self) -> str:
        """For a table."""
        return f"{self.transport} {self.mode}{'' if self.digest else ' no digest'}"

    def sync(self, port: int, token: str) -> WeightSync:
        """The sender for an engine on this host."""
        return WeightSync(
            [ReceiverTarget("127.0.0.1", port)],
            token=token,
            transport="shm" if self.transport == "arena" else self.transport,
            mode=self.mode,
            digest=self.digest,
            deadline_s=self.deadline_s,
            bucket_bytes=self.bucket_bytes,
        )


def measure(case: Case, metas: Sequence[TensorMeta], repeats: int, save: Callable[[Result], None]) -> Result:
    """Push `repeats` + 1 versions, each element changed in between, and read the engine's weights at the end.

    Args:
        case: How.
        metas: What.
        repeats: How many pushes after the first. The second warms up too: from the third on times are "steady".
        save: Given what is known so far, after each push.

    Returns:
        Times in seconds, bytes, the engine's memory, and "live_weights_equal" (see `proved`). Raises a `SyncError`
        where something fails.
    """
    source, tensors = _source(case, metas)
    token = secrets.token_hex(16)
    result: Result = {"tensors": len(metas), "bytes": sum(meta.nbytes for meta in metas)}
    with engine(metas, case.engine, token) as process, case.sync(process.port, token) as sync:
        reports: list[dict[str, Any]] = []
        walls: list[float] = []
        for version in range(repeats + 1):
            change(tensors, version)
            settle(case.trainer)
            start = time.perf_counter()
            report = sync.push(source, version)
            walls.append(time.perf_counter() - start)
            reports.append(report.as_dict())
            save(result | {"pushes": reports})
        result["live_weights_equal"] = proved(sync, case, source, repeats)
        memory = process.memory()
    totals = [float(report["total_s"]) for report in reports]
    steady = totals[2:] or totals
    return result | {
        "pushes": reports,
        "first_s": totals[0],
        "second_s": totals[1] if len(totals) > 1 else None,
        "steady_s": statistics.median(steady),
        "best_s": min(steady),
        "wall_steady_s": statistics.median(walls[2:] or walls),
        "gb_per_s": result["bytes"] / statistics.median(steady) / 1e9,
        "engine_memory": memory,
    }


def proved(sync: WeightSync, case: Case, source: SharedArena | NamedTensors, version: int) -> bool | None:
    """Whether the engine's live weights are the trainer's: both are read now; None where nothing was digested.

    Raises `DriftError` where they differ.
    """
    if not case.digest:
        return None
    sync.check(version, fingerprint(dict(source))())
    return True


def _source(case: Case, metas: Sequence[TensorMeta]) -> tuple[SharedArena | NamedTensors, dict[str, torch.Tensor]]:
    if case.transport != "arena":
        tensors = random_tensors(metas, case.trainer, seed=1)
        return NamedTensors(tensors.items()), tensors
    arena = SharedArena(metas)
    generator = torch.Generator().manual_seed(1)
    for tensor in arena.tensors.values():
        fill(tensor, generator)
    return arena, arena.tensors
