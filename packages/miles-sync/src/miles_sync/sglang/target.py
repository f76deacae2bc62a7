"""An SGLang engine as a target: its HTTP side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from miles_sync.channel import TOKEN_VARIABLE, Channel, Deadline, accept, listen
from miles_sync.errors import MismatchError, ProtocolError
from miles_sync.messages import Commit, Prepare
from miles_sync.sglang.command import Attend, Command, Idle, Order, envelope
from miles_sync.sglang.http import EngineHttp
from miles_sync.targets import Once

LOADER = "miles_sync.sglang.loader.load"
"""What the engine's `--custom-weight-loader` must list."""

TESTED_VERSION = "0.5.17"

__all__ = ["LOADER", "TESTED_VERSION", "TOKEN_VARIABLE", "SGLangTarget"]

# Settings under which the engine's own load_weights is not enough to replace its weights, or under which
# one loader does not see all of them; the value is what this release was tested with.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "pp_size": (1,),
    "dp_size": (1,),
    "quantization": (None,),
    "speculative_algorithm": (None,),
    "weight_cache_mode": (None, "off"),
}


class SGLangTarget:
    """One rank of an engine, reached over HTTP; it connects back to this process for everything but orders.

    An engine with tensor parallelism has one target a rank: `SGLangTarget.ranks`.

    Two traps of the engine's update lock shape this. A request to update weights waits until all running
    requests have ended, unless generation is paused: so only connecting, the check of a new layout and the
    commit are such requests, and weights move while the engine generates. And the version label changes even
    where the loader failed, since its result is discarded: a failed commit puts the old label back.

    Args:
        url: Where the engine serves, "http://127.0.0.1:30000".
        api_key: Its `--api-key`, if it has one.
        admin_api_key: Its `--admin-api-key`; where it is missing, `api_key` guards the update routes too.
        listen_host: Address of this process that the engine can reach; loopback unless you ask for more.
        name: For reports and errors; the url if empty.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        listen_host: str = "127.0.0.1",
        name: str = "",
    ) -> None:
        """Keep the address; nothing is opened yet."""
        self.name = name or url
        self._http = EngineHttp(url, api_key, admin_api_key, self.name)
        self._listen_host = listen_host
        self._rank, self._ranks = 0, 1
        self._commits = Once()

    @classmethod
    def ranks(cls, url: str, tp_size: int, **settings: Any) -> tuple[SGLangTarget, ...]:
        """The targets of an engine that was started with `--tp-size`: push to all of them.

        Args:
            url: As above.
            tp_size: How many ranks it has; held against the engine's own word when connecting.
            **settings: As above.
        """
        if tp_size < 1:
            raise ValueError(f"tp_size={tp_size} must be 1 or more")
        targets = tuple(cls(url, **settings) for _ in range(tp_size))
        for rank, target in enumerate(targets):
            target._rank, target._ranks, target._commits = rank, tp_size, targets[0]._commits
            target.name += f" rank {rank}" if tp_size > 1 else ""
            target._http.name = target.name
        return targets

    def pause(self, mode: Literal["in_place", "retract"] = "retract", *, deadline_s: float = 60.0) -> None:
        """Stop generation between two batches, running requests kept; returns when every rank has stopped.

        Args:
            mode: "retract" gives their cache up and computes it anew afterwards, with the new weights; "in_place" keeps
                it, computed with the old ones.
            deadline_s: Bound on each of the two requests.
        """
        self._http.post("/pause_generation", {"mode": mode}, "begin", Deadline(deadline_s))
        self._tell(dict.fromkeys(range(self._ranks), Idle()), "begin", Deadline(deadline_s))

    def resume(self, *, deadline_s: float = 60.0) -> None:
        """Go on generating."""
        body = {"torch_empty_cache": False}  # its default gives the allocator's blocks back, to be asked for again
        self._http.post("/continue_generation", body, "commit", Deadline(deadline_s))

    def flush(self, *, deadline_s: float = 60.0) -> None:
        """Drop the prefix cache. Raises `ProtocolError` where the engine will not: it holds requests in place."""
        if not self._http.tell("/flush_cache", {}, "commit", Deadline(deadline_s)):
            raise ProtocolError("the engine would not flush its cache", stage="commit", peer=self.name)

    def connect(self, token: str, deadline: Deadline) -> Channel:
        """Check that the engine is one of the tested kind, have it connect back, and authenticate.

        Raises `MismatchError` where version or settings do not fit, `AuthError` where a key or the token differs.
        """
        self._check_settings(self._http.get("/server_info", "connect", deadline))
        with listen(self._listen_host) as listener:
            host, port = listener.getsockname()[:2]
            self._tell({self._rank: Attend(host, port, deadline.left())}, "connect", deadline)
            return accept(listener, token, deadline, self.name)

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        """Have the engine's main loop carry out an order. A commit also sets the version label.

        Ranks prepare one by one. They commit together: the first target that comes commits them all, for no batch may
        see two versions.
        """
        if isinstance(order, Prepare):
            self._tell({self._rank: Order("prepare", order.txn)}, "begin", deadline)
            return
        everyone = dict.fromkeys(range(self._ranks), Order("commit", order.txn))
        self._commits.once(order.txn, lambda: self._tell(everyone, "commit", deadline, str(version)))

    def published(self, deadline: Deadline) -> str:
        """The `weight_version` that the engine stamps on what it generates."""
        return str(self._http.get("/model_info", "status", deadline).get("weight_version"))

    def publish(self, version: str, deadline: Deadline) -> None:
        """Set that label, aborting nothing."""
        body = {"new_version": version, "abort_all_requests": False}
        self._http.post("/update_weight_version", body, "commit", deadline)

    def _check_settings(self, info: dict[str, Any]) -> None:
        version = info.get("version")
        if version != TESTED_VERSION:
            raise self._unfit(f"it runs SGLang {version}; this release is tested with {TESTED_VERSION}")
        # An engine asked for a loader that it does not list raises in its main loop, and ends.
        if LOADER not in (info.get("custom_weight_loader") or ()):
            raise self._unfit(f"start it with --custom-weight-loader {LOADER}")
        if (ranks := info.get("tp_size", 1)) != self._ranks:
            hint = f"SGLangTarget.ranks(url, {ranks})"
            raise self._unfit(f"tp_size={ranks}, {self._ranks} targets were made for it: use {hint}")
        for setting, tested in _REQUIRED.items():
            if setting in info and info[setting] not in tested:
                allowed = " or ".join(map(str, tested))
                raise self._unfit(f"{setting}={info[setting]!r}, this release needs {allowed}")

    def _unfit(self, reason: str) -> MismatchError:
        return MismatchError(reason, stage="connect", peer=self.name)

    def _tell(
        self, commands: Mapping[int, Command], stage: str, deadline: Deadline, version: str | None = None
    ) -> None:
        """Give ranks a command each, in one request; the others idle."""
        body: dict[str, Any] = {
            "serialized_named_tensors": [envelope(commands.get(rank, Idle())) for rank in range(self._ranks)],
            "load_format": LOADER,
            # All three default to something that would hurt: a flush with requests running fails the call
            # after the weights have changed, an abort ends other people's requests.
            "flush_cache": False,
            "abort_all_requests": False,
            "torch_empty_cache": False,
        }
        if version is not None:
            body["weight_version"] = version
        reply = self._http.post("/update_weights_from_tensor", body, stage, deadline)
        if not reply.get("success"):
            reason = f"the engine refused the update: {reply.get('message')}"
            raise ProtocolError(reason, stage=stage, peer=self.name)
