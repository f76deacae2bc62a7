"""An OpenAI-compatible server for agents under training: chat completions, one key per rollout.

agent ──HTTP, Authorization: Bearer KEY──▶ endpoint ──token ids──▶ engine
                                              └── turns: ids and logprobs as sampled, under KEY ──▶ samples
"""

import hashlib
import secrets
from types import TracebackType
from typing import Self

from aiohttp import web

from miles_core.types import Sample
from miles_rollout.agents._protocol import Refused, read_request
from miles_rollout.agents._session import Session
from miles_rollout.generate.types import GenerateContext

MODEL_NAME = "policy"
_MAX_BODY_BYTES = 1 << 26
_SHUTDOWN_S = 1.0


class Endpoint:
    """Serves rollouts while entered. Requests without the key of an open rollout get 401."""

    def __init__(self, context: GenerateContext, *, host: str = "127.0.0.1", max_total_tokens: int = 32768):
        """Nothing listens yet.

        Args:
            context: what samples, and how. A request may lower `max_new_tokens`; with a temperature or top_p of its
                own its reply is not trained on.
            host: address to listen on; agents elsewhere than on this machine need another than loopback.
            max_total_tokens: most tokens of one conversation; at most what the model can take.
        """
        self._context, self._host, self._max_total_tokens = context, host, max_total_tokens
        self._sessions: dict[bytes, Session] = {}
        self._runner: web.AppRunner | None = None
        self.base_url = ""
        """For OpenAI's client, e.g. "http://127.0.0.1:41231/v1"; once entered."""

    async def __aenter__(self) -> Self:
        """Listen on a free port."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        # An agent that hangs up (a time-out, and it asks again) leaves no turn behind: its handler is cancelled.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, 0, backlog=1024)
        await site.start()
        port = self._runner.addresses[0][1]
        self.base_url = f"http://{self._host}:{port}/v1"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening and cancel what is on its way."""
        for session in self._sessions.values():
            session.close()
        assert self._runner is not None
        await self._runner.cleanup()

    def open(self, seed: int) -> tuple[str, Session]:
        """Begin a rollout.

        Args:
            seed: of its sampling.

        Returns:
            The key that its agent shows, and the session that keeps its turns.
        """
        key = secrets.token_urlsafe(32)
        session = Session(self._context, seed, self._max_total_tokens)
        self._sessions[_digest(key)] = session
        return key, session

    def close(self, key: str) -> list[Sample]:
        """End a rollout: its key opens nothing any more. Returns its samples, one a branch."""
        session = self._sessions.pop(_digest(key))
        session.close()
        return session.samples()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        try:
            session = self._session(request)
            asked = read_request(await request.read())
            answer = await session.complete(asked)
        except Refused as refusal:
            return web.json_response(refusal.body(), status=refusal.status)
        if not asked.stream:
            return web.Response(body=answer.whole(), content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        await response.write(b"".join(answer.stream(include_usage)))
        return response

    async def _models(self, request: web.Request) -> web.Response:
        try:
            self._session(request)
        except Refused as refusal:
            return web.json_response(refusal.body(), status=refusal.status)
        model = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "miles"}
        return web.json_response({"object": "list", "data": [model]})

    def _session(self, request: web.Request) -> Session:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        session = self._sessions.get(_digest(key)) if scheme.lower() == "bearer" else None
        if session is None:
            raise Refused(401, "invalid_api_key", "No open rollout has this key.")
        return session


def _digest(key: str) -> bytes:
    # Looked up by digest: how long that takes says nothing about the key.
    return hashlib.blake2b(key.encode(errors="surrogateescape"), digest_size=32).digest()
