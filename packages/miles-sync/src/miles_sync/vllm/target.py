"""A vLLM server as a target: its HTTP side."""

from __future__ import annotations

import threading
from typing import Any

from miles_sync.channel import Channel, Deadline, accept, listen
from miles_sync.errors import MismatchError
from miles_sync.messages import Commit, Prepare
from miles_sync.sglang.http import EngineHttp
from miles_sync.targets import Once

BACKEND = "miles-sync"
"""What the server's weight-transfer configuration must name."""

TESTED_VERSION = "0.33.0"


class VLLMTarget:
    """One rank of a vLLM server; it connects back to this process for everything but orders.

    Weights move while the server generates; an order is carried out between two of its steps. In place, pause it
    (POST /pause?mode=keep) meanwhile. Its prefix cache outlives the weights: POST /reset_prefix_cache after a push.

    Args:
        url: Where the server listens.
        listen_host: Address of this process that the server can reach.
        name: For reports and errors; the url if empty.
    """

    def __init__(self, url: str, *, listen_host: str = "127.0.0.1", name: str = "") -> None:
        """Keep the address; nothing is opened yet."""
        self.name = name or url
        self._http = EngineHttp(url, None, None, self.name)
        self._listen_host = listen_host
        self._rank, self._ranks = 0, 1
        self._commits, self._turn = Once(), threading.Lock()

    @classmethod
    def ranks(cls, url: str, tp_size: int, **settings: Any) -> tuple[VLLMTarget, ...]:
        """The targets of a server with tensor parallelism: push to all of them."""
        targets = tuple(cls(url, **settings) for _ in range(tp_size))
        for rank, target in enumerate(targets):
            target._rank, target._ranks = rank, tp_size
            target._commits, target._turn = targets[0]._commits, targets[0]._turn
            target.name = target._http.name = f"{target.name} rank {rank}"
        return targets

    def connect(self, token: str, deadline: Deadline) -> Channel:
        """Have the rank connect back. Raises `MismatchError` for another number of ranks, `AuthError`."""
        found = self._http.get("/get_world_size", "connect", deadline).get("world_size")
        if found != self._ranks:
            reason = f"it has {found} ranks, {self._ranks} targets were made for it: use VLLMTarget.ranks(url, {found})"
            raise MismatchError(reason, stage="connect", peer=self.name)
        with listen(self._listen_host) as listener:
            host, port = listener.getsockname()[:2]
            attend = {"rank": self._rank, "host": host, "port": port, "deadline_s": deadline.left()}
            self._http.post("/init_weight_transfer_engine", {"init_info": attend}, "connect", deadline)
            return accept(listener, token, deadline, self.name)

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        """Have the workers carry out an order: prepare rank by rank, commit all at once, and set the version."""
        if isinstance(order, Commit):
            everyone = [{"what": "commit", "txn": order.txn}] * self._ranks
            self._commits.once(order.txn, lambda: self._session(everyone, "commit", deadline, str(version)))
            return
        orders = [{"what": "prepare", "txn": order.txn} if rank == self._rank else {} for rank in range(self._ranks)]
        self._session(orders, "begin", deadline)

    def published(self, deadline: Deadline) -> str:
        """The version that the server names."""
        return str(self._http.get("/weight_info", "status", deadline).get("weight_version"))

    def publish(self, version: str, deadline: Deadline) -> None:
        """Set it."""
        self._http.post("/update_weight_version", {"new_version": version}, "commit", deadline)

    def _session(
        self, orders: list[dict[str, str]], stage: str, deadline: Deadline, version: str | None = None
    ) -> None:
        """One order, in the three calls that vLLM makes of an update; it knows one at a time."""
        with self._turn:
            self._http.post("/start_weight_update", {}, stage, deadline)
            self._http.post("/update_weights", {"update_info": orders}, stage, deadline)
            self._http.post("/finish_weight_update", {"weight_version": version}, stage, deadline)
