r"""A conversation as tokens: the chat template renders, and only what is new is tokenised.

The model's second turn, with what the engine saw and made as it was (`=`) and what is tokenised now (`+`):

    turn 1   = <|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n    = <tool_call>...</tool_call><|im_end|>
    turn 2   + \n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n

The new text is what the template writes after a reply, found by rendering the conversation with a mark in place of
that reply. So a reply is never written out and tokenised again, and a template that would write it differently (other
blanks in a tool call, thoughts left out) changes nothing of what the model is trained on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from miles_core.errors import InputError
from miles_core.types import Ints
from miles_rollout.tokenizer import Tokenizer

Message = Mapping[str, Any]

_MARK = "\ue000reply\ue001"  # private-use characters: no template looks for them, no blank to trim


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """What is appended before the model's next turn.

    Attributes:
        ids: tokens of the new text alone, int32 [N].
        rendered: the whole conversation by the template, the assistant's turn opened at its end.
        rewritten: the template renders the turns before differently now that they have successors (thoughts of
            earlier turns left out, say): n + 1 turns rendered do not begin with n turns rendered. The tokens do.
    """

    ids: Ints
    rendered: str
    rewritten: bool = False


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A tokenizer's chat template with the tools and variables of one conversation.

    Attributes:
        tokenizer: of the model.
        tools: JSON schemas of what the model may call.
        variables: of the template's own, e.g. {"enable_thinking": False}.
    """

    tokenizer: Tokenizer
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def open(self, messages: Sequence[Message]) -> NewTokens:
        """The first prompt of a conversation, all of it tokenised.

        Raises:
            InputError: the template refuses the messages or renders nothing.
        """
        rendered = self._render(messages)
        ids = self.tokenizer.encode_more(rendered)
        if not ids:
            raise InputError("messages", list(messages), "must have at least one token", "Give a message.")
        return NewTokens(np.asarray(ids, np.int32), rendered)

    def follow(
        self, before: str, history: Sequence[Message], reply: Message, ended_by: str, new: Sequence[Message]
    ) -> NewTokens:
        """What comes after the model's reply.

        Args:
            before: the conversation as rendered for that reply.
            history: its messages.
            reply: the model's, as a message.
            ended_by: text of the stop token that ended it; empty where none did.
            new: what follows: tool results, a user's turn.

        Raises:
            InputError: the template refuses the messages, or does not show the content of an assistant's message.
        """
        marked = self._render([*history, {"role": "assistant", "content": _MARK}, *new])
        _, found, text = marked.partition(_MARK)
        if not found:
            raise InputError(
                "chat template",
                marked[-200:],
                "it does not show the content of an assistant's message that others follow, so what to append cannot "
                "be told from what was generated",
                "Put a chat_template.jinja beside the model that does.",
            )
        text = text.removeprefix(ended_by)
        rendered, closed = self._render([*history, reply, *new]), self._render([*history, reply], opened=False)
        kept = rendered.startswith(before) and rendered.startswith(closed) and rendered.endswith(text)
        return NewTokens(np.asarray(self.tokenizer.encode_more(text), np.int32), rendered, rewritten=not kept)

    def _render(self, messages: Sequence[Message], *, opened: bool = True) -> str:
        return self.tokenizer.render(
            messages, tools=self.tools or None, add_generation_prompt=opened, variables=self.variables
        )
