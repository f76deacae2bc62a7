"""An SGLang engine as a target: its HTTP side."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from miles_sync.channel import Channel, Deadline, accept, listen
from miles_sync.errors import (
    AuthError,
    DeadlineError,
    MismatchError,
    PeerLostError,
    ProtocolError,
    SyncError,
)
from miles_sync.messages import Commit, Prepare
from miles_sync.sglang.command import Attend, Command, Order, envelope

LOADER = "miles_sync.sglang.loader.load"
"""What the engine's `--custom-weight-loader` must list."""

TOKEN_VARIABLE = "MILES_SYNC_TOKEN"
"""The environment variable that gives the engine its token."""

TESTED_VERSION = "0.5.17"

_MAX_REPLY_BYTES = 16 << 20

# Settings under which the engine's own load_weights is not enough to replace its weights, or under which
# one loader does not see all of them; the value is what this release was tested with.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "tp_size": (1,),
    "pp_size": (1,),
    "dp_size": (1,),
    "quantization": (None,),
    "speculative_algorithm": (None,),
    "weight_cache_mode": (None, "off"),
}


class SGLangTarget:
    """One engine, reached over HTTP; it connects back to this process for everything but orders.

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
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must look like http://127.0.0.1:30000")
        self.name = name or url
        self._scheme, self._host, self._port = parts.scheme, parts.hostname, parts.port
        self._api_key = api_key
        self._admin_key = admin_api_key or api_key
        self._listen_host = listen_host

    def connect(self, token: str, deadline: Deadline) -> Channel:
        """Check that the engine is one of the tested kind, have it connect back, and authenticate.

        Raises `MismatchError` where version or settings do not fit, `AuthError` where a key or the token differs.
        """
        self._check_settings(self._get("/server_info", "connect", deadline))
        with listen(self._listen_host) as listener:
            host, port = listener.getsockname()[:2]
            self._command(Attend(host, port, deadline.left()), "connect", deadline)
            return accept(listener, token, deadline, self.name)

    def order(self, channel: Channel, order: Prepare | Commit, version: int, deadline: Deadline) -> None:
        """Have the engine's main loop carry out an order. A commit also sets the version label."""
        if isinstance(order, Prepare):
            self._command(Order("prepare", order.txn), "begin", deadline)
        else:
            self._command(Order("commit", order.txn), "commit", deadline, str(version))

    def published(self, deadline: Deadline) -> str:
        """The `weight_version` that the engine stamps on what it generates."""
        return str(self._get("/model_info", "status", deadline).get("weight_version"))

    def publish(self, version: str, deadline: Deadline) -> None:
        """Set that label, aborting nothing."""
        body = {"new_version": version, "abort_all_requests": False}
        self._request("POST", "/update_weight_version", self._admin_key, body, "commit", deadline)

    def _check_settings(self, info: dict[str, Any]) -> None:
        version = info.get("version")
        if version != TESTED_VERSION:
            raise self._unfit(f"it runs SGLang {version}; this release is tested with {TESTED_VERSION}")
        # An engine asked for a loader that it does not list raises in its main loop, and ends.
        if LOADER not in (info.get("custom_weight_loader") or ()):
            raise self._unfit(f"start it with --custom-weight-loader {LOADER}")
        for setting, tested in _REQUIRED.items():
            if setting in info and info[setting] not in tested:
                allowed = " or ".join(map(str, tested))
                raise self._unfit(f"{setting}={info[setting]!r}, this release needs {allowed}")

    def _unfit(self, reason: str) -> MismatchError:
        return MismatchError(reason, stage="connect", peer=self.name)

    def _command(self, command: Command, stage: str, deadline: Deadline, version: str | None = None) -> None:
        body: dict[str, Any] = {
            "serialized_named_tensors": [envelope(command)],
            "load_format": LOADER,
            # All three default to something that would hurt: a flush with requests running fails the call
            # after the weights have changed, an abort ends other people's requests.
            "flush_cache": False,
            "abort_all_requests": False,
            "torch_empty_cache": False,
        }
        if version is not None:
            body["weight_version"] = version
        reply = self._request("POST", "/update_weights_from_tensor", self._admin_key, body, stage, deadline)
        if not reply.get("success"):
            reason = f"the engine refused the update: {reply.get('message')}"
            raise ProtocolError(reason, stage=stage, peer=self.name)

    def _get(self, path: str, stage: str, deadline: Deadline) -> dict[str, Any]:
        return self._request("GET", path, self._api_key, None, stage, deadline)

    def _request(
        self,
        method: str,
        path: str,
        key: str | None,
        body: dict[str, Any] | None,
        stage: str,
        deadline: Deadline,
    ) -> dict[str, Any]:
        """One request. Each opens its own connection: a push makes four, and none can be stale."""
        secure = self._scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=max(deadline.left(), 0.001))
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            data = response.read(_MAX_REPLY_BYTES)
        except TimeoutError as error:
            reason = (
                f"{path} had no answer within {deadline.seconds:g} s; an update waits for running requests "
                "to end: pause generation first, or allow a longer deadline"
            )
            raise DeadlineError(reason, stage=stage, peer=self.name) from error
        except (OSError, http.client.HTTPException) as error:
            reason = f"{path}: {type(error).__name__}: {error}"
            raise PeerLostError(reason, stage=stage, peer=self.name) from error
        finally:
            connection.close()
        return self._decoded(path, response.status, data, stage)

    def _decoded(self, path: str, status: int, data: bytes, stage: str) -> dict[str, Any]:
        if status in (401, 403):
            reason = f"{path} answered {status}: check api_key and admin_api_key"
            raise AuthError(reason, stage=stage, peer=self.name)
        if status not in (200, 400):  # 400 carries a message of the engine's own
            raise SyncError(f"{path} answered {status}", stage=stage, peer=self.name)
        try:
            reply = json.loads(data)
        except ValueError as error:
            reason = f"{path} did not answer with JSON"
            raise ProtocolError(reason, stage=stage, peer=self.name) from error
        if not isinstance(reply, dict):
            raise ProtocolError(f"{path} answered {type(reply).__name__}", stage=stage, peer=self.name)
        return reply
