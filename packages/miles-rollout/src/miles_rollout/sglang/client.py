"""The HTTP client of one SGLang server: the Engine protocol over a pooled aiohttp session."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import numpy as np
import tenacity

from miles_core.types import VersionSpan
from miles_rollout.engine import Completion, PauseMode, SamplingParams
from miles_rollout.errors import EngineError, EngineUnavailable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is and what opens it.

    Attributes:
        url: e.g. "http://127.0.0.1:21345".
        api_key: for generating.
        admin_api_key: for everything that changes the engine.
        name: for messages.
    """

    url: str
    api_key: str = field(repr=False)
    admin_api_key: str = field(repr=False)
    name: str = "engine"


class _Finish(msgspec.Struct):
    type: str
    message: str = ""


class _Meta(msgspec.Struct):
    finish_reason: _Finish
    weight_version: str
    # [logprob, token id, text]; null where the logprob is not finite.
    output_token_logprobs: list[tuple[float | None, int, str | None]] = []


class _Reply(msgspec.Struct):
    output_ids: list[int]
    meta_info: _Meta


_decode = msgspec.json.Decoder(list[_Reply]).decode
_encode = msgspec.json.Encoder().encode


class SGLangEngine:
    """Client of one SGLang server. Implements `miles_rollout.engine.Engine`."""

    def __init__(self, address: EngineAddress, *, max_retries: int = 2, request_deadline_s: float = 300.0):
        """Nothing is sent yet.

        Args:
            address: of the server.
            max_retries: how often a request that found no answer is sent again.
            request_deadline_s: seconds for one try of one request.
        """
        self._address = address
        self._max_retries = max_retries
        self._deadline_s = request_deadline_s
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        num_samples: int,
        *,
        seeds: Sequence[int] | None = None,
        namespace: str = "",
    ) -> list[Completion]:
        """See Engine.generate. One request carries the whole group."""
        if not input_ids:  # it would end SGLang's scheduler, and the engine with it
            raise EngineError("request refused", "a prompt of no tokens")
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids),
        }
        each = [params] * num_samples if seeds is None else [params | {"sampling_seed": seed} for seed in seeds]
        if len(each) != num_samples:
            raise ValueError(f"seeds has {len(each)} entries: give one for each of num_samples={num_samples}")
        # The samples as so many prompts: SGLang's own `n` would send the prompt through the model once more.
        body = {
            "input_ids": [list(input_ids)] * num_samples,
            "sampling_params": each,
            "return_logprob": True,
            "extra_key": [namespace] * num_samples,
        }
        answer = await self._request("POST", "/generate", _encode(body), retries=self._max_retries)
        try:
            replies = _decode(answer)
        except msgspec.DecodeError as error:
            raise EngineError("unreadable answer", f"{self._address.name} /generate: {error}") from error
        if len(replies) != num_samples:
            raise EngineError("wrong number of samples", f"asked for {num_samples}, got {len(replies)}")
        return [_completion(reply, sampling.stop_token_ids) for reply in replies]

    async def health(self) -> None:
        """See Engine.health. Takes about a second: SGLang generates a token and looks once a second."""
        await self._request("GET", "/health_generate", None, retries=0)

    async def weight_version(self) -> int:
        """See Engine.weight_version."""
        answer = await self._request("GET", "/model_info", None, retries=self._max_retries)
        return _version(msgspec.json.decode(answer)["weight_version"])

    async def flush_cache(self) -> None:
        """See Engine.flush_cache."""
        await self._request("POST", "/flush_cache", None, retries=0, admin=True)

    async def pause(self, mode: PauseMode = "abort") -> None:
        """See Engine.pause."""
        await self.admin("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """See Engine.resume."""
        await self.admin("/continue_generation", {"torch_empty_cache": False})

    async def admin(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Post to an endpoint that changes the engine, e.g. /update_weights_from_tensor. Never retried.

        Args:
            path: the endpoint.
            body: sent as JSON.

        Returns:
            The JSON answer.

        Raises:
            EngineUnavailable: no answer.
            EngineError: refused; the message says why.
        """
        answer = await self._request("POST", path, _encode(body), retries=0, admin=True)
        return msgspec.json.decode(answer)

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _request(self, method: str, path: str, body: bytes | None, *, retries: int, admin: bool = False) -> bytes:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(EngineUnavailable),
            stop=tenacity.stop_after_attempt(retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
            before_sleep=tenacity.before_sleep_log(_log, logging.WARNING),
            reraise=True,
        )
        return await retrying(self._once, method, path, body, admin)

    async def _once(self, method: str, path: str, body: bytes | None, admin: bool) -> bytes:
        if self._session is None:  # made here: a session belongs to the running loop
            self._session = aiohttp.ClientSession(
                self._address.url,
                # The engine queues requests itself; a limit here would hide them from its scheduler. It hangs up after
                # 5 s of silence: a connection taken up at that moment would fail, and not every call may be retried.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
                timeout=aiohttp.ClientTimeout(total=self._deadline_s),
            )
        key = self._address.admin_api_key if admin else self._address.api_key
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        where = f"{self._address.name} {path}"
        try:
            async with self._session.request(method, path, data=body, headers=headers) as response:
                answer = await response.read()
        except TimeoutError as error:
            raise EngineUnavailable("engine too slow", f"{where}: no answer in {self._deadline_s:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineUnavailable("engine unreachable", f"{where}: {error}") from error
        if response.status >= 400:
            said = f"{where}: {response.status} {_said(answer)}"
            if response.status >= 500:
                raise EngineUnavailable("engine failed", said)
            raise EngineError("request refused", said)
        return answer


def _completion(reply: _Reply, stop_token_ids: Sequence[int]) -> Completion:
    meta = reply.meta_info
    reason = meta.finish_reason.type
    if reason not in ("stop", "length", "abort"):
        raise EngineError("unknown finish reason", reason)
    if reason == "length" and reply.output_ids and reply.output_ids[-1] in stop_token_ids:
        reason = "stop"  # SGLang looks at the length first: a stop token in the last place allowed ended the text
    if reason == "abort" and not reply.output_ids:
        raise EngineUnavailable("request aborted", meta.finish_reason.message)
    logprobs = [entry[0] for entry in meta.output_token_logprobs]
    if [entry[1] for entry in meta.output_token_logprobs] != reply.output_ids:
        raise EngineError("tokens and logprobs differ", f"{len(reply.output_ids)} tokens, {len(logprobs)} logprobs")
    values = np.asarray([math.nan if value is None else value for value in logprobs], np.float32)
    if not np.isfinite(values).all():
        raise EngineError("logprob not finite", f"token {reply.output_ids[int(np.argmin(np.isfinite(values)))]}")
    span = VersionSpan(0, len(values), _version(meta.weight_version))
    return Completion(np.asarray(reply.output_ids, np.int32), values, reason, (span,))


class _Error(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _Error | str = ""
    message: str = ""


def _said(answer: bytes) -> str:
    """The message in an error's body, in the shapes that SGLang gives it."""
    try:
        refusal = msgspec.json.decode(answer, type=_Refusal)
    except msgspec.DecodeError:
        return answer[:500].decode(errors="replace")
    return (refusal.error.message if isinstance(refusal.error, _Error) else refusal.error) or refusal.message


def _version(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise EngineError("weight version is not a number", repr(text)) from None
