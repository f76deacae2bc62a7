"""What a push did."""

from __future__ import annotations

from dataclasses import dataclass

from miles_sync.messages import Mode

STAGES: tuple[str, ...] = ("begin", "transfer", "verify", "commit")


@dataclass(frozen=True)
class Route:
    """How one receiver got its weights.

    Attributes:
        target: The receiver, as the caller named it.
        transport: "shm", "gloo", "nccl", "ipc"; "none" where it already served this version and digest.
        why: Why this transport, in one sentence.
    """

    target: str
    transport: str
    why: str


@dataclass(frozen=True)
class SyncReport:
    """One committed version.

    Attributes:
        version: The version that every target now serves.
        digest: 32 hex digits, the same at the sender and every receiver; "" where none was asked for.
        mode: "staged" or "in_place".
        nbytes: Bytes of one copy of the weights, alignment included.
        tensors: How many tensors they are.
        seconds: By stage: "begin", "transfer" (packing and the sender's digest included), "verify", "commit".
        routes: One per target.
    """

    version: int
    digest: str
    mode: Mode
    nbytes: int
    tensors: int
    seconds: dict[str, float]
    routes: tuple[Route, ...]

    @property
    def total_s(self) -> float:
        """Seconds from begin to the last commit acknowledged."""
        return sum(self.seconds.values())

    @property
    def gb_per_s(self) -> float:
        """Weights over total time, 1e9 bytes a second; one copy counts once, whatever the number of targets."""
        return self.nbytes / self.total_s / 1e9 if self.total_s else 0.0

    def as_dict(self) -> dict[str, float | int | str]:
        """Flat, for metrics and JSON."""
        return {
            "version": self.version,
            "digest": self.digest,
            "mode": self.mode,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "total_s": self.total_s,
            "gb_per_s": self.gb_per_s,
            "transport": ",".join(sorted({route.transport for route in self.routes})),
            **{f"{stage}_s": self.seconds[stage] for stage in STAGES},
        }


@dataclass(frozen=True)
class TargetState:
    """What a target said it serves.

    Attributes:
        target: As the caller named it.
        version: Last committed through miles-sync, or None.
        digest: Of that transaction, or "".
        intact: Whether its live weights, read again now, are those of that commit; None where nothing was
            committed.
        dirty: Whether a commit failed half-way.
        published: The version that the target tells its own clients, where it has such a thing, else None.
    """

    target: str
    version: int | None
    digest: str
    intact: bool | None
    dirty: bool
    published: str | None
