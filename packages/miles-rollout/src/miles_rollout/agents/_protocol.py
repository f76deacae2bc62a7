"""OpenAI's chat completions as far as they are spoken here: requests checked, answers composed.

What cannot be honoured is refused by name rather than ignored: an agent that asks for a penalty or a JSON schema would
otherwise be trained on something else than it believes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from miles_rollout.engine import Completion
from miles_rollout.generate.chat import Message
from miles_rollout.generate.tools import ToolCall
from miles_rollout.tokenizer import Tokenizer


class Refused(Exception):
    """A request that gets an error as its answer.

    Attributes:
        status: of HTTP.
        code: OpenAI's word for it.
    """

    def __init__(self, status: int, code: str, message: str):
        """Keep what the answer is made of."""
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    def body(self) -> dict[str, Any]:
        """The answer in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class StreamOptions(msgspec.Struct):
    """How a stream ends."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request. OpenAI's names and meanings; null is as good as left out."""

    messages: list[dict[str, Any]]
    model: str = ""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = None
    # Not OpenAI's: variables of the chat template, as other servers take them.
    chat_template_kwargs: dict[str, Any] | None = None
    # Fine as they usually are, and refused otherwise.
    n: Literal[1] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    # Without effect on what is sampled. The seeds are the rollout's own.
    seed: int | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        """The bound on new tokens, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


_BOUNDS = (("temperature", 0, 100), ("top_p", 1e-6, 1), ("frequency_penalty", 0, 0), ("presence_penalty", 0, 0))
_decode = msgspec.json.Decoder(ChatRequest).decode
_encode = msgspec.json.Encoder().encode


def read_request(body: bytes) -> ChatRequest:
    """Check the body of a request.

    Raises:
        Refused: 400, with the field and what is wrong with it.
    """
    try:
        request = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(
            400, "unsupported_or_invalid", f"{error}. Leave it out, or give it a value of that kind."
        ) from None
    if not request.messages:
        raise Refused(400, "invalid_messages", "messages = []: give at least one.")
    if request.most_tokens is not None and request.most_tokens < 1:
        raise Refused(400, "invalid_max_tokens", f"max_tokens = {request.most_tokens}: must be at least 1.")
    for name, low, high in _BOUNDS:
        value = getattr(request, name)
        if value is not None and not low <= value <= high:
            raise Refused(400, f"invalid_{name}", f"{name} = {value}: must be from {low} to {high}.")
    if not all(request.stops) and request.stops:
        raise Refused(400, "invalid_stop", "stop holds an empty string: every response would end at once.")
    request.messages = [read_message(message, number) for number, message in enumerate(request.messages)]
    return request


_EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "name")  # where clients send null or []


def read_message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One message in the form that templates take: content as one text, arguments of calls as objects.

    Raises:
        Refused: no role, content that is not text, or a call whose arguments are no JSON object.
    """
    where = f"messages[{number}]"
    if not isinstance(message.get("role"), str):
        raise Refused(400, "invalid_messages", f"{where} has no role.")
    read = {key: value for key, value in message.items() if not (key in _EMPTY and not value)}
    read["content"] = _text(message.get("content"), where)
    if "tool_calls" in read:
        read["tool_calls"] = [_call(call, where) for call in read["tool_calls"]]
    return read


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise Refused(400, "invalid_messages", f"{where}.content must be text, or parts of type text.")


def _call(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function["arguments"]
        arguments = msgspec.json.decode(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise TypeError(f"arguments are {type(arguments).__name__}")
        return {
            "id": str(call.get("id", "")),
            "type": "function",
            "function": {"name": function["name"], "arguments": arguments},
        }
    except (KeyError, TypeError, AttributeError, msgspec.DecodeError) as error:
        raise Refused(
            400, "invalid_messages", f"{where}.tool_calls: a call has a function with a name and a JSON object: {error}"
        ) from None


class Answer(msgspec.Struct, frozen=True):
    """What a completed request is answered with.

    Attributes:
        id: of the answer.
        created: seconds since 1970.
        model: echoed from the request.
        content: what the model said.
        calls: what it called.
        finish_reason: OpenAI's word.
        logprobs: entries of the tokens, or None where not asked for.
        prompt_tokens: tokens that the model saw before its reply.
        completion_tokens: tokens that it made.
    """

    id: str
    created: int
    model: str
    content: str
    calls: Sequence[ToolCall]
    finish_reason: str
    logprobs: Sequence[Mapping[str, Any]] | None
    prompt_tokens: int
    completion_tokens: int

    def whole(self) -> bytes:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content or (None if self.calls else "")}
        if self.calls:
            message["tool_calls"] = [_openai_call(call) for call in self.calls]
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason, "logprobs": self._logprobs()}
        return _encode({**self._head("chat.completion"), "choices": [choice], "usage": self._usage()})

    def stream(self, include_usage: bool) -> Iterator[bytes]:
        """The answer as server-sent events, its text in one of them: the engine answers whole."""
        yield self._event({"role": "assistant", "content": ""})
        if self.content:
            yield self._event({"content": self.content}, logprobs=self._logprobs())
        for index, call in enumerate(self.calls):
            yield self._event({"tool_calls": [{"index": index, **_openai_call(call)}]})
        yield self._event({}, self.finish_reason)
        if include_usage:
            yield _sse({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _event(
        self, delta: Mapping[str, Any], finish_reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return _sse({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def _logprobs(self) -> dict[str, Any] | None:
        return None if self.logprobs is None else {"content": self.logprobs, "refusal": None}


def token_logprobs(completion: Completion, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """OpenAI's entries for the tokens of a response."""
    entries: list[dict[str, Any]] = []
    for position, logprob in enumerate(completion.logprobs.tolist()):
        text = tokenizer.decode(completion.tokens[position : position + 1])
        entries.append({"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []})
    return entries


def reply_message(content: str, calls: Sequence[ToolCall]) -> Message:
    """The model's reply as a message for the template."""
    return {
        "role": "assistant",
        "content": content,
        **({"tool_calls": [call.message for call in calls]} if calls else {}),
    }


def _openai_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _sse(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
