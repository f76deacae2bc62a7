"""What a conversation leaves behind: turns in a tree, and the samples made of its branches.

A turn is what was appended, then what was sampled. A conversation that goes back to an earlier turn and on from there
is another branch; each branch is one sample, and each sampled token is trained once, in the first branch that has it:

    A ─ B ─ C        sample 1: A, B, C trained
        └── D        sample 2: D trained, A and B context
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from miles_core.types import Bools, Floats, Ints, Sample, VersionSpan
from miles_rollout.engine import Completion
from miles_rollout.generate.chat import ChatFormat, Message, NewTokens
from miles_rollout.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One reply of the model.

    Attributes:
        parent: the turn it went on from; None opens a conversation.
        messages: all that came before the reply.
        reply: the reply as a message.
        new: what was appended to the parent's tokens before sampling.
        completion: what was sampled.
        text: of the reply, without the token that ended it.
        ended_by: text of that token; empty where none ended it.
        trained: sampled as the run samples, so to be learned from.
    """

    parent: "Turn | None"
    messages: tuple[Message, ...]
    reply: Message
    new: NewTokens
    completion: Completion
    text: str
    ended_by: str
    trained: bool = True

    @property
    def path(self) -> "list[Turn]":
        """The turns from the first to this one."""
        turns: list[Turn] = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.parent
        return turns[::-1]

    @property
    def tokens(self) -> Ints:
        """All ids up to the end of the reply, as the engine saw and made them, int32 [T]."""
        return np.concatenate([part for turn in self.path for part in (turn.new.ids, turn.completion.tokens)])

    def follow(self, chat: ChatFormat, new: Sequence[Message]) -> NewTokens:
        """What to append for `new` messages after this turn."""
        return chat.follow(self.new.rendered, self.messages, self.reply, self.ended_by, new)


def split_stop(completion: Completion, stop_token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of a response, and that of the stop token at its end (empty where none ended it)."""
    tokens = completion.tokens
    stopped = int(completion.finish_reason == "stop" and int(tokens[-1]) in stop_token_ids)
    kept = len(tokens) - stopped
    return tokenizer.decode(tokens[:kept]), tokenizer.decode(tokens[kept:])


def samples_of(turns: Sequence[Turn]) -> list[Sample]:
    """One sample for each branch that has something to learn, in the order in which the branches ended.

    Args:
        turns: in the order in which they were sampled; parents come before their children.
    """
    parents = {turn.parent for turn in turns}
    leaves = [turn for turn in turns if turn not in parents]
    claimed: set[Turn] = set()
    samples: list[Sample] = []
    for number, leaf in enumerate(leaves):
        own = [turn for turn in leaf.path if turn not in claimed and turn.trained]
        claimed.update(leaf.path)
        if own:
            samples.append(_sample(leaf, set(own), {"branch": number, "branches": len(leaves)}))
    return samples


def _sample(leaf: Turn, own: set[Turn], metadata: dict[str, Any]) -> Sample:
    masks: list[Bools] = []
    logprobs: list[Floats] = []
    spans: list[VersionSpan] = []
    length = 0
    for turn in leaf.path:
        appended, sampled = len(turn.new.ids), len(turn.completion.tokens)
        masks += [np.zeros(appended, np.bool_), np.full(sampled, turn in own)]
        logprobs += [np.zeros(appended, np.float32), turn.completion.logprobs]
        length += appended
        spans += [VersionSpan(length + a, length + b, version) for a, b, version in turn.completion.version_spans]
        length += sampled
    return Sample(
        tokens=leaf.tokens,
        loss_mask=np.concatenate(masks),
        rollout_logprobs=np.concatenate(logprobs),
        version_spans=tuple(spans),
        finish_reason=leaf.completion.finish_reason,
        text=leaf.text,
        metadata={
            **metadata,
            "turns": len(leaf.path),
            "rewritten_turns": sum(turn.new.rewritten for turn in leaf.path),
            "messages": [dict(message) for message in (*leaf.messages, leaf.reply)],
        },
    )
