"""Between workers and trainer: a bounded queue of whole groups, handed out on leases.

A group is waiting, leased, or accounted for (trained on, or dropped with a reason), and nothing else:

    put ──▶ waiting ──take──▶ leased ──acknowledge──▶ trained
              │                  └──────release─────▶ waiting
              └── too stale when taken ─────────────▶ dropped

`put` waits while the queue is full; `take` waits until enough groups are there. Plain asyncio: miles_core.cluster makes
an actor of it.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miles_core.types import Group


@dataclass(frozen=True, slots=True)
class Lease:
    """Groups handed to the trainer; they come back if the step fails.

    Attributes:
        id: number to acknowledge or release it by.
        groups: in the order in which they were put.
    """

    id: int
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """Where every group ever put is now: `put == waiting + leased + trained + sum(dropped.values())`.

    Attributes:
        put: groups ever put.
        waiting: in the queue.
        leased: with the trainer.
        trained: acknowledged.
        dropped: reason to count.
    """

    put: int
    waiting: int
    leased: int
    trained: int
    dropped: Mapping[str, int]


class SampleQueue:
    """Bounded queue of groups. All methods belong on one event loop."""

    def __init__(self, capacity: int, max_staleness: int | None = None):
        """Make an empty queue.

        Args:
            capacity: groups that may wait; `put` waits while there are as many.
            max_staleness: groups staler than this when taken are dropped; None takes any.
        """
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1: a queue of none can pass nothing on")
        self._capacity = capacity
        self._max_staleness = max_staleness
        self._waiting: deque[Group] = deque()
        self._leases: dict[int, tuple[Group, ...]] = {}
        self._next_lease = 0
        self._put = 0
        self._trained = 0
        self._dropped: Counter[str] = Counter()
        self._changed = asyncio.Condition()

    async def put(self, groups: Sequence[Group]) -> None:
        """Add groups, one by one as there is room."""
        for group in groups:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._waiting) < self._capacity)
                self._waiting.append(group)
                self._put += 1
                self._changed.notify_all()

    async def take(self, count: int, weight_version: int = 0) -> Lease:
        """Lease the `count` oldest groups that are fresh enough, waiting until there are as many.

        Args:
            count: number of groups; at most the capacity, or nobody could ever fill it.
            weight_version: the trainer's version now; staleness is counted against it.

        Raises:
            ValueError: `count` exceeds the capacity.
        """
        if count > self._capacity:
            raise ValueError(f"count={count} exceeds the queue's capacity of {self._capacity}: it can never be met")
        async with self._changed:
            while True:
                self._drop_stale(weight_version)
                if len(self._waiting) >= count:
                    break
                await self._changed.wait()
            groups = tuple(self._waiting.popleft() for _ in range(count))
            lease = Lease(self._next_lease, groups)
            self._next_lease += 1
            self._leases[lease.id] = groups
            self._changed.notify_all()
        return lease

    async def acknowledge(self, lease_id: int) -> None:
        """The groups of this lease were trained on."""
        self._trained += len(self._leases.pop(lease_id))

    async def release(self, lease_id: int) -> None:
        """The step failed: the groups of this lease go back to the front, in their order."""
        async with self._changed:
            self._waiting.extendleft(reversed(self._leases.pop(lease_id)))
            self._changed.notify_all()

    async def counts(self) -> QueueCounts:
        """Where every group is now."""
        leased = sum(map(len, self._leases.values()))
        return QueueCounts(self._put, len(self._waiting), leased, self._trained, dict(self._dropped))

    def _drop_stale(self, weight_version: int) -> None:
        if self._max_staleness is None:
            return
        fresh = [g for g in self._waiting if weight_version - g.oldest_version <= self._max_staleness]
        if dropped := len(self._waiting) - len(fresh):
            self._dropped["stale"] += dropped
            self._waiting = deque(fresh)
            self._changed.notify_all()
