"""Requests to an SGLang engine."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from miles_sync.channel import Deadline
from miles_sync.errors import AuthError, DeadlineError, PeerLostError, ProtocolError, SyncError

_MAX_REPLY_BYTES = 16 << 20


class EngineHttp:
    """One engine's HTTP side. Each request opens its own connection: a push makes few, and none can be stale.

    Attributes:
        name: Of the engine, for errors.
    """

    def __init__(self, url: str, api_key: str | None, admin_api_key: str | None, name: str) -> None:
        """Keep the address. Raises `ValueError` for what is no address."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must look like http://127.0.0.1:30000")
        self.name = name
        self._scheme, self._host, self._port = parts.scheme, parts.hostname, parts.port
        self._api_key = api_key
        self._admin_key = admin_api_key or api_key

    def get(self, path: str, stage: str, deadline: Deadline) -> dict[str, Any]:
        """GET with the engine's ordinary key: its JSON answer."""
        return self._decoded(path, *self._send("GET", path, self._api_key, None, stage, deadline), stage)

    def post(self, path: str, body: dict[str, Any], stage: str, deadline: Deadline) -> dict[str, Any]:
        """POST with the key of its administrator: its JSON answer, which may say that it failed."""
        return self._decoded(path, *self._send("POST", path, self._admin_key, body, stage, deadline), stage)

    def tell(self, path: str, body: dict[str, Any], stage: str, deadline: Deadline) -> bool:
        """POST with the key of its administrator: whether it agreed."""
        status, _ = self._send("POST", path, self._admin_key, body, stage, deadline)
        return status == 200

    def _send(
        self, method: str, path: str, key: str | None, body: dict[str, Any] | None, stage: str, deadline: Deadline
    ) -> tuple[int, bytes]:
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
        if response.status in (401, 403):
            reason = f"{path} answered {response.status}: check api_key and admin_api_key"
            raise AuthError(reason, stage=stage, peer=self.name)
        return response.status, data

    def _decoded(self, path: str, status: int, data: bytes, stage: str) -> dict[str, Any]:
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
