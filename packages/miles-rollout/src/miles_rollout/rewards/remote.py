"""Rewards from a server: a reward model that SGLang serves, or anything that answers over HTTP.

    judge ──▶ one request a group ──▶ server       pooled connections, a deadline a try, retries of what may pass
          ◀── as many judgements ◀──

What the server says is data: it cannot fail but by a reason. Connections are shared by all groups of an event loop.
"""

import asyncio
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import aiohttp
import msgspec
import tenacity

from miles_core.errors import InputError, RolloutError
from miles_core.types import Prompt, Sample
from miles_rollout.rewards.judge import Verdict, verdict_of
from miles_rollout.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

# Of an answer: a thousand judgements with 64 parts each are less.
_MAX_ANSWER_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where a reward server is, and how long to ask it.

    Attributes:
        url: of the endpoint, e.g. "http://127.0.0.1:30000/classify".
        api_key_variable: environment variable of this process whose value is sent as a bearer token; empty for none.
        timeout_s: seconds for one try of one request.
        retries: how often a request is sent again that found no answer, or one of 429 or 5xx.
        connections: that are open at the same time; other requests wait.
    """

    url: str
    api_key_variable: str = ""
    timeout_s: float = 60.0
    retries: int = 3
    connections: int = 64


class _Failed(Exception):
    """The server gave no judgement."""

    def __init__(self, failure: str, detail: str):
        super().__init__(f"{failure}: {detail}")
        self.failure, self.detail = failure, detail


class _MayPass(_Failed):
    """The same request may succeed later."""


class _Protocol(Protocol):
    """How judgements are asked for and given."""

    def ask(self, prompt: Prompt, samples: Sequence[Sample]) -> Any:
        """The request's JSON."""
        ...

    def read(self, answer: bytes) -> list[Any]:
        """One judgement per sample; raises DecodeError for what is none."""
        ...


class RemoteJudge:
    """A Judge that asks a server; also a Reward, for rewards that have use for another one's."""

    def __init__(self, settings: ServerSettings, protocol: _Protocol):
        """Nothing is sent yet.

        Raises:
            InputError: the variable with the key is not set, or the URL is none.
        """
        if not settings.url.startswith(("http://", "https://")):
            raise InputError("hooks.reward.url", settings.url, "must begin with http:// or https://", "Mend it.")
        self._headers = {"Content-Type": "application/json", **_authorization(settings.api_key_variable)}
        self._settings = settings
        self._protocol = protocol
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore()

    async def start(self) -> None:
        """Nothing to start: a server that is not there yet may be when the first group is."""

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        """See Judge.judge."""
        url = self._settings.url
        try:
            body = msgspec.json.encode(self._protocol.ask(prompt, samples))
            judgements = self._protocol.read(await self._ask(body))
            if len(judgements) != len(samples):
                raise _Failed("reward server malformed", f"{len(judgements)} judgements of {len(samples)} samples")
        except msgspec.DecodeError as error:
            failed = Verdict(failure="reward server malformed", detail=f"{url}: {error}"[:500])
        except _Failed as error:
            failed = Verdict(failure=error.failure, detail=f"{url}: {error.detail}"[:500])
        except InputError as error:  # a chat template that refuses these messages
            failed = Verdict(failure="reward request refused", detail=str(error)[:500])
        else:
            return [verdict_of(judgement, url) for judgement in judgements]
        return [failed] * len(samples)

    async def __call__(self, prompt: Prompt, sample: Sample) -> dict[str, float]:
        """Judge one sample.

        Raises:
            RolloutError: the server gave no judgement.
        """
        (verdict,) = await self.judge(prompt, [sample])
        if verdict.failure:
            raise RolloutError(f"{verdict.failure}: {verdict.detail}")
        return {**verdict.parts, "reward": verdict.reward}

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _ask(self, body: bytes) -> bytes:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_MayPass),
            stop=tenacity.stop_after_attempt(self._settings.retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10.0),
            before_sleep=tenacity.before_sleep_log(_log, logging.WARNING),
            reraise=True,
        )
        return await retrying(self._once, body)

    async def _once(self, body: bytes) -> bytes:
        settings = self._settings
        if self._session is None:  # made here: a session belongs to the running loop
            # A connection that the server closes at the moment it is taken up would fail: they are not kept long.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
            timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
            self._turns = asyncio.Semaphore(settings.connections)  # waiting for one is not the server's time
        try:
            async with self._turns, self._session.post(settings.url, data=body, allow_redirects=False) as response:
                answer = await _read(response)
        except TimeoutError as error:
            raise _MayPass("reward server too slow", f"no answer in {settings.timeout_s:g} s") from error
        except aiohttp.ClientError as error:
            raise _MayPass("reward server unreachable", str(error)) from error
        if response.status == 429 or response.status >= 500:
            raise _MayPass("reward server failed", f"{response.status} {answer[:300].decode(errors='replace')}")
        if response.status != 200:
            raise _Failed("reward request refused", f"{response.status} {answer[:300].decode(errors='replace')}")
        return answer


class HttpServer(RemoteJudge):
    """A server of one's own. It gets a group and gives a judgement per sample, in their order.

    POST {"prompt": text or messages, "metadata": {...}, "responses": [text, ...], "finish_reasons": ["stop", ...]},
    answered with {"rewards": [1.0, {"reward": 0.5, "style": 0.1}, ...]}.
    """

    def __init__(
        self,
        *,
        url: str,
        api_key_variable: str = "",
        timeout_s: float = 60.0,
        retries: int = 3,
        connections: int = 64,
    ):
        """Nothing is sent yet.

        Args:
            url: of the endpoint.
            api_key_variable: see ServerSettings, as the others.
            timeout_s: of one try.
            retries: of one request.
            connections: at the same time.

        Raises:
            InputError: see RemoteJudge.
        """
        super().__init__(ServerSettings(url, api_key_variable, timeout_s, retries, connections), _Plain())


class SGLangModel(RemoteJudge):
    """A reward model that SGLang serves (`--is-embedding`), asked at its endpoint /classify (0.5.17)."""

    def __init__(
        self,
        *,
        url: str,
        tokenizer: str | None = None,
        feed: Literal["chat", "tokens", "text"] = "chat",
        index: int = 0,
        api_key_variable: str = "",
        timeout_s: float = 60.0,
        retries: int = 3,
        connections: int = 64,
    ):
        """Read the reward model's tokenizer, if it is needed; nothing is sent yet.

        Args:
            url: of the server, e.g. "http://127.0.0.1:30000".
            tokenizer: directory of the reward model, for its chat template; needed for "chat".
            feed: what the model reads. "chat": the conversation with the response as the assistant's turn, through the
                reward model's own template. "tokens": the policy's tokens as they are, where both share a vocabulary.
                "text": prompt and response one after the other.
            index: which of the model's scores is the reward; where it has several, all of them are its parts.
            api_key_variable: see ServerSettings, as the others.
            timeout_s: of one try.
            retries: of one request.
            connections: at the same time.

        Raises:
            InputError: "chat" without a tokenizer, or see RemoteJudge and Tokenizer.
        """
        if feed not in ("chat", "tokens", "text"):
            raise InputError("hooks.reward.feed", feed, 'must be "chat", "tokens" or "text"', "Choose one.")
        if feed == "chat" and tokenizer is None:
            rule = 'must name the reward model\'s directory, for feed = "chat"'
            raise InputError("hooks.reward.tokenizer", None, rule, "Give it.")
        reader = Tokenizer(tokenizer) if tokenizer is not None and feed == "chat" else None
        settings = ServerSettings(url.rstrip("/") + "/classify", api_key_variable, timeout_s, retries, connections)
        super().__init__(settings, _Classify(feed, reader, index))


class _Rewards(msgspec.Struct):
    rewards: list[float | dict[str, float]]


class _Plain:
    """See HttpServer."""

    def ask(self, prompt: Prompt, samples: Sequence[Sample]) -> Any:
        return {
            "prompt": prompt.content,
            "metadata": prompt.metadata,
            "responses": [sample.text for sample in samples],
            "finish_reasons": [sample.finish_reason for sample in samples],
        }

    def read(self, answer: bytes) -> list[Any]:
        return list(msgspec.json.decode(answer, type=_Rewards).rewards)


class _Scores(msgspec.Struct):
    embedding: list[float | None] | float


@dataclass(frozen=True, slots=True)
class _Classify:
    """See SGLangModel. A list of inputs is a batch; each gets {"embedding": [score, ...]}."""

    feed: str
    tokenizer: Tokenizer | None
    index: int

    def ask(self, prompt: Prompt, samples: Sequence[Sample]) -> Any:
        if self.feed == "tokens":
            return {"input_ids": [sample.tokens.tolist() for sample in samples]}
        if self.tokenizer is None:
            return {"text": [_plain_text(prompt) + sample.text for sample in samples]}
        messages = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else prompt.content
        turns = [[*messages, {"role": "assistant", "content": sample.text}] for sample in samples]
        return {
            "input_ids": [
                self.tokenizer.encode_more(self.tokenizer.render(turn, add_generation_prompt=False)) for turn in turns
            ]
        }

    def read(self, answer: bytes) -> list[Any]:
        return [self._judgement(scores.embedding) for scores in msgspec.json.decode(answer, type=list[_Scores])]

    def _judgement(self, scores: list[float | None] | float) -> Mapping[str, float] | float:
        numbers = [math.nan if score is None else score for score in (scores if isinstance(scores, list) else [scores])]
        if self.index >= len(numbers):
            raise msgspec.DecodeError(f"{len(numbers)} scores, and hooks.reward.index is {self.index}")
        if len(numbers) == 1:
            return numbers[0]
        return {"reward": numbers[self.index], **{f"score_{number}": score for number, score in enumerate(numbers)}}


async def _read(response: aiohttp.ClientResponse) -> bytes:
    answer = bytearray()
    async for piece in response.content.iter_any():
        answer += piece
        if len(answer) > _MAX_ANSWER_BYTES:
            raise _Failed("reward server malformed", f"an answer of more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(answer)


def _plain_text(prompt: Prompt) -> str:
    if not isinstance(prompt.content, str):
        raise _Failed("reward request refused", 'chat messages cannot be fed as "text": use feed = "chat"')
    return prompt.content


def _authorization(variable: str) -> dict[str, str]:
    if not variable:
        return {}
    if not os.environ.get(variable):
        raise InputError(
            "hooks.reward.api_key_variable", variable, "is not set in the worker's environment", "Export it."
        )
    return {"Authorization": f"Bearer {os.environ[variable]}"}
