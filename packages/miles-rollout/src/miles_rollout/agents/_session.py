"""One rollout behind the endpoint: every request is a turn, kept as the engine saw and made it."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from miles_core.errors import InputError
from miles_core.types import Sample
from miles_rollout.agents._protocol import Answer, ChatRequest, Refused, reply_message, token_logprobs
from miles_rollout.engine import Completion, SamplingParams
from miles_rollout.errors import EngineError, EngineUnavailable
from miles_rollout.generate.chat import ChatFormat, Message
from miles_rollout.generate.multi_turn import turn_seed
from miles_rollout.generate.tools import ToolCall, read_tool_calls
from miles_rollout.generate.turns import Turn, samples_of, split_stop
from miles_rollout.generate.types import GenerateContext
from miles_rollout.tokenizer import Tokenizer

# Keys of a message in any order are the same message.
_canonical = msgspec.json.Encoder(order="deterministic").encode


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a request goes on: after a recorded turn, or nowhere."""

    parent: Turn | None
    new: Sequence[Message]


class Session:
    """Answers the requests of one agent and keeps its turns.

    A request whose messages begin with those of a recorded turn and its reply goes on from there: its tokens are those
    of that turn with the new messages appended. Any other opens a branch, tokenised from its messages.
    """

    def __init__(self, context: GenerateContext, seed: int, max_total_tokens: int):
        """Begin with nothing recorded.

        Args:
            context: what samples, and how.
            seed: of the rollout.
            max_total_tokens: most tokens of one conversation.
        """
        self._context, self._seed, self._max_total_tokens = context, seed, max_total_tokens
        self._turns: list[Turn] = []
        self._by_digest: dict[bytes, Turn] = {}
        self._num_requests = 0
        self._open = True
        self.engine_error: EngineError | None = None
        """The last error of the engine: the likely cause when the agent gives up."""

    @property
    def turns(self) -> Sequence[Turn]:
        """All turns, in the order in which they were answered."""
        return self._turns

    def close(self) -> None:
        """Answer nothing more, and record nothing that is still on its way."""
        self._open = False

    def samples(self) -> list[Sample]:
        """One sample a branch, trained where the model spoke as the run samples."""
        return samples_of(self._turns)

    async def complete(self, request: ChatRequest) -> Answer:
        """Sample a reply.

        Raises:
            Refused: the messages cannot be rendered or are too long, the engine gave none, or the session is over.
        """
        if not self._open:
            raise Refused(401, "rollout_over", "This rollout is over.")
        number, self._num_requests = self._num_requests, self._num_requests + 1
        tools = request.tools or [] if request.tool_choice != "none" else []
        chat = ChatFormat(self._context.tokenizer, tools, request.chat_template_kwargs or {})
        digests = _digests(request.messages, tools, chat.variables)
        place = self._find(request.messages, digests)
        try:
            new = chat.open(place.new) if place.parent is None else place.parent.follow(chat, place.new)
        except InputError as error:
            raise Refused(400, "invalid_messages", str(error)) from error
        before = [] if place.parent is None else place.parent.tokens.tolist()
        input_ids = [*before, *new.ids.tolist()]
        sampling, trained = self._sampling(request, len(input_ids))
        completion = await self._sample(input_ids, sampling, turn_seed(self._seed, number))
        completion = cut(completion, request.stops, sampling.stop_token_ids, self._context.tokenizer)
        text, ended_by = split_stop(completion, sampling.stop_token_ids, self._context.tokenizer)
        said, calls = _before_stop(text, request.stops), []
        if tools:
            said, calls = _read_calls(said, f"{self._seed}/{number}")
        turn = Turn(
            place.parent, tuple(request.messages), reply_message(said, calls), new, completion, text, ended_by, trained
        )
        self._record(turn, digests[-1])
        return self._answer(request, turn, calls, len(input_ids), number)

    def _find(self, messages: Sequence[Message], digests: Sequence[bytes]) -> _Place:
        for end in range(len(messages) - 1, 0, -1):
            if messages[end - 1]["role"] == "assistant" and digests[end] in self._by_digest:
                return _Place(self._by_digest[digests[end]], messages[end:])
        return _Place(None, messages)

    def _sampling(self, request: ChatRequest, prompt_tokens: int) -> tuple[SamplingParams, bool]:
        """How to sample, and whether it is as the run does: other tokens are not those of the policy trained."""
        own = self._context.sampling
        room = self._max_total_tokens - prompt_tokens
        if room <= 0:
            raise Refused(
                400,
                "context_length_exceeded",
                f"The messages have {prompt_tokens} tokens; with the reply they may have {self._max_total_tokens}.",
            )
        most = min(own.max_new_tokens, room, request.most_tokens or own.max_new_tokens)
        temperature = own.temperature if request.temperature is None else request.temperature
        top_p = own.top_p if request.top_p is None else request.top_p
        # A stop string that is one token ends sampling there; others are found afterwards.
        single = (self._context.tokenizer.token_id(stop) for stop in request.stops)
        stops = (*own.stop_token_ids, *(token for token in single if token is not None))
        sampling = replace(own, max_new_tokens=most, temperature=temperature, top_p=top_p, stop_token_ids=stops)
        return sampling, (temperature, top_p) == (own.temperature, own.top_p)

    async def _sample(self, input_ids: Sequence[int], sampling: SamplingParams, seed: int) -> Completion:
        namespace = str(self._context.weight_version)
        try:
            made = await self._context.engine.generate(input_ids, sampling, 1, seeds=[seed], namespace=namespace)
        except EngineError as error:
            self.engine_error = error
            status = 503 if isinstance(error, EngineUnavailable) else 400
            raise Refused(status, "engine_error", str(error)) from error
        return made[0]

    def _record(self, turn: Turn, digest: bytes) -> None:
        if not self._open:
            raise Refused(401, "rollout_over", "This rollout was over before the reply was there.")
        self._turns.append(turn)
        self._by_digest[_chain(digest, turn.reply)] = turn

    def _answer(
        self, request: ChatRequest, turn: Turn, calls: Sequence[ToolCall], prompt_tokens: int, number: int
    ) -> Answer:
        reason = "length" if turn.completion.finish_reason == "length" else "stop"
        return Answer(
            id=f"chatcmpl-{number}",
            created=int(time.time()),
            model=request.model,
            content=turn.reply["content"],
            calls=calls,
            finish_reason="tool_calls" if calls else reason,
            logprobs=token_logprobs(turn.completion, self._context.tokenizer) if request.logprobs else None,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(turn.completion.tokens),
        )


def cut(
    completion: Completion, stops: Sequence[str], stop_token_ids: Sequence[int], tokenizer: Tokenizer
) -> Completion:
    """End a response with the token that completes the first stop string: what sampling up to there would have given.

    Args:
        completion: as sampled.
        stops: strings; none leaves it as it is.
        stop_token_ids: that ended it, perhaps.
        tokenizer: of the model.
    """
    text, _ = split_stop(completion, stop_token_ids, tokenizer)
    if not any(stop in text for stop in stops):
        return completion
    low, high = 1, len(completion.tokens)  # the fewest tokens that have one: text only grows at its end
    while low < high:
        middle = (low + high) // 2
        found = any(stop in tokenizer.decode(completion.tokens[:middle]) for stop in stops)
        low, high = (low, middle) if found else (middle + 1, high)
    spans = tuple(span._replace(stop=min(span.stop, low)) for span in completion.version_spans if span.start < low)
    return Completion(completion.tokens[:low], np.asarray(completion.logprobs[:low]), "stop", spans)


def _before_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _read_calls(text: str, salt: str) -> tuple[str, list[ToolCall]]:
    """Calls that can all be read, or none: what cannot is text that the agent may make sense of."""
    said, calls = read_tool_calls(text, salt)
    return (text, []) if any(call.error for call in calls) else (said, calls)


def _digests(messages: Sequence[Message], tools: Sequence[Any], variables: Mapping[str, Any]) -> list[bytes]:
    """Digests of the first 0, 1, ... all messages, tools and template variables included."""
    digests = [hashlib.blake2b(_canonical([tools, variables]), digest_size=16).digest()]
    for message in messages:
        digests.append(_chain(digests[-1], message))
    return digests


def _chain(digest: bytes, message: Message) -> bytes:
    return hashlib.blake2b(digest + _canonical(message), digest_size=16).digest()
