"""Conversations: the model, tools that it calls, and a user who may answer. Its own tokens are trained, others not."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from miles_core.hooks import load_object
from miles_core.types import Prompt, Sample
from miles_rollout._concurrent import run_all
from miles_rollout.errors import EngineError
from miles_rollout.generate.chat import ChatFormat, Message, NewTokens
from miles_rollout.generate.tools import Tool, ToolCall, answer, load_tools, read_tool_calls
from miles_rollout.generate.turns import Turn, samples_of, split_stop
from miles_rollout.generate.types import GenerateContext, LostSample

User = Callable[[Prompt, Sequence[Message]], Awaitable[str | None]]
"""Answers a reply that calls no tool, given the conversation so far; None ends it."""


async def multi_turn(
    prompt: Prompt,
    seeds: Sequence[int],
    context: GenerateContext,
    *,
    tools: Sequence[Tool] | str = (),
    user: User | str | None = None,
    max_turns: int = 8,
    max_total_tokens: int = 32768,
    tool_timeout_s: float = 30.0,
) -> list[Sample | LostSample]:
    """Hold one conversation for each seed.

    Each turn appends to the tokens as they were generated; only what is new is tokenised. A conversation ends with a
    reply that calls no tool (or that the user has no answer to), after `max_turns`, or where no token is left.

    Args:
        prompt: text counts as one user message. Needs a model with a chat template.
        seeds: one a conversation; the first turn is sampled with the seed itself, the others with seeds derived.
        context: its `max_new_tokens` bounds each turn.
        tools: what the model may call, or "package.module:NAME" of a list of tools and async functions. Their errors
            go to the model as tool messages.
        user: answers replies, or its "package.module:name".
        max_turns: most replies of the model.
        max_total_tokens: most tokens of a conversation; at most what the model can take.
        tool_timeout_s: seconds for each call.

    Returns:
        One sample a conversation. `text` is the last reply; `metadata` holds "messages", "turns" and "ended" ("reply",
        "max_turns", "max_total_tokens" or "abort"). Conversations that the engine failed are LostSamples.
    """
    named = load_tools(tools)
    answers: User | None = load_object(user, "user") if isinstance(user, str) else user
    chat = ChatFormat(context.tokenizer, [tool.schema for tool in named.values()])
    talk = _Talk(prompt, context, chat, named, answers, max_turns, max_total_tokens, tool_timeout_s)
    return await run_all(talk.hold(seed) for seed in seeds)


@dataclass(frozen=True, slots=True)
class _Talk:
    prompt: Prompt
    context: GenerateContext
    chat: ChatFormat
    tools: Mapping[str, Tool]
    user: User | None
    max_turns: int
    max_total_tokens: int
    tool_timeout_s: float

    async def hold(self, seed: int) -> Sample | LostSample:
        content = self.prompt.content
        messages = ({"role": "user", "content": content},) if isinstance(content, str) else tuple(content)
        new, turns, ended = self.chat.open(messages), list[Turn](), ""
        try:
            while not ended:
                turn, calls = await self._reply(
                    turns[-1] if turns else None, messages, new, turn_seed(seed, len(turns))
                )
                if turn is None:
                    ended = "max_total_tokens"
                    break
                turns.append(turn)
                ended, added = await self._go_on(turn, calls, len(turns))
                if not ended:
                    new = turn.follow(self.chat, added)
                    messages = (*messages, turn.reply, *added)
        except EngineError as error:
            return LostSample(error.reason, error.detail)
        if not turns:
            return LostSample("prompt too long", f"{len(new.ids)} tokens, max_total_tokens = {self.max_total_tokens}")
        (sample,) = samples_of(turns)
        return sample.replace(metadata={**sample.metadata, "ended": ended})

    async def _reply(
        self, parent: Turn | None, messages: tuple[Message, ...], new: NewTokens, seed: int
    ) -> tuple[Turn | None, list[ToolCall]]:
        context, sampling = self.context, self.context.sampling
        input_ids = [*(() if parent is None else parent.tokens.tolist()), *new.ids.tolist()]
        room = self.max_total_tokens - len(input_ids)
        if room <= 0:
            return None, []
        (completion,) = await context.engine.generate(
            input_ids,
            replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)),
            1,
            seeds=[seed],
            namespace=str(context.weight_version),
        )
        text, ended_by = split_stop(completion, sampling.stop_token_ids, context.tokenizer)
        said, calls = read_tool_calls(text, str(seed)) if self.tools else (text, [])
        readable = [call.message for call in calls if not call.error]
        reply = {"role": "assistant", "content": said, **({"tool_calls": readable} if readable else {})}
        return Turn(parent, messages, reply, new, completion, text, ended_by), calls

    async def _go_on(self, turn: Turn, calls: Sequence[ToolCall], num_turns: int) -> tuple[str, list[Message]]:
        """Why the conversation ends here, or what is said to the model next."""
        if turn.completion.finish_reason == "abort":
            return "abort", []
        if num_turns == self.max_turns and (calls or self.user):
            return "max_turns", []
        if calls:
            return "", await run_all(answer(call, self.tools, self.tool_timeout_s) for call in calls)
        said = None if self.user is None else await self.user(self.prompt, (*turn.messages, turn.reply))
        return ("reply", []) if said is None else ("", [{"role": "user", "content": said}])


def turn_seed(seed: int, turn: int) -> int:
    """The seed of one turn: that of the sample for the first, 63 bits of a hash for the others."""
    if turn == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/turn {turn}".encode(), digest_size=8).digest()) >> 1
