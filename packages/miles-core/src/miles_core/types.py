"""The words of a run as data: prompt, sample, group, batch, report.

Everything is columnar numpy. A sample of three tokens, two of them prompt:

    tokens            [7, 9, 4]        int32    prompt and response
    loss_mask         [F, F, T]        bool     trained, hence sampled
    rollout_logprobs  [0, 0, -0.7]     float32  what the engine reported, 0 where nothing was sampled
    version_spans     ((2, 3, 5),)     tokens 2..3 were sampled by weights 5

Symbols: T tokens of a sample or of all samples together, N samples, G samples of a group.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class VersionSpan(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a sample were sampled by the weights of `weight_version`."""

    start: int
    stop: int
    weight_version: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One input to learn from.

    Attributes:
        id: unique within the run; the data source's name for the row and its epoch.
        content: plain text, or chat messages ({"role": ..., "content": ...}) for the tokenizer's chat template.
        metadata: the rest of the row, e.g. the reference answer. JSON-able.
    """

    id: str
    content: str | Sequence[Mapping[str, str]]
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One token sequence with its streams. Arrays are read-only by agreement: `replace` makes a changed copy.

    Attributes:
        tokens: ids of prompt and response, exactly as the engine saw and made them, int32 [T].
        loss_mask: True where a token is trained, bool [T]. Never the first token: nothing predicts it.
        rollout_logprobs: log probability under the sampling weights, float32 [T]; 0 where not sampled.
        version_spans: which weights sampled which tokens.
        finish_reason: "stop", "length" or "abort".
        text: the response, decoded.
        reward: the number to learn from; NaN until judged.
        reward_parts: named parts of the reward, for metrics (e.g. {"exact": 1.0}).
        metadata: whatever rollout code wants to keep. JSON-able.
        routed_experts: expert ids per token, layer and rank, [T-1, L, K], or None.
        columns: further numbers per token by name, float32 [T] each: what a loss or an advantage estimator needs and
            only rollout code knows, e.g. `teacher_logprobs`. They are not written to disk with the sample.
    """

    tokens: Ints
    loss_mask: Bools
    rollout_logprobs: Floats
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    text: str = ""
    reward: float = float("nan")
    reward_parts: Mapping[str, float] = field(default_factory=dict[str, float])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    routed_experts: NDArray[Any] | None = None
    columns: Mapping[str, Floats] = field(default_factory=dict[str, Floats])

    @property
    def response_len(self) -> int:
        """Number of trained tokens."""
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int:
        """The oldest weights that took part; staleness is counted from here."""
        return min(span.weight_version for span in self.version_spans)

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes` applied."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The samples of one prompt. Pickles as columns: a handful of arrays, however many samples."""

    prompt: Prompt
    samples: tuple[Sample, ...]

    @property
    def id(self) -> str:
        """The prompt's id: a group is the answer to one prompt."""
        return self.prompt.id

    @property
    def rewards(self) -> Floats:
        """Rewards of the samples, float32 [G]."""
        return np.asarray([sample.reward for sample in self.samples], np.float32)

    @property
    def oldest_version(self) -> int:
        """The oldest weights that took part in any sample."""
        return min(sample.oldest_version for sample in self.samples)

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross a process boundary as columns (thousands of small arrays cost more than the call that carries them)."""
        samples = self.samples
        columns = tuple(
            np.concatenate([getattr(sample, name) for sample in samples])
            for name in ("tokens", "loss_mask", "rollout_logprobs")
        )
        lengths = [len(sample.tokens) for sample in samples]
        rest = [
            (
                tuple(map(tuple, sample.version_spans)),
                sample.finish_reason,
                sample.text,
                sample.reward,
                dict(sample.reward_parts),
                dict(sample.metadata),
                sample.routed_experts,
                dict(sample.columns),
            )
            for sample in samples
        ]
        return _group_from_columns, (self.prompt, columns, lengths, rest)


def _group_from_columns(
    prompt: Prompt,
    columns: tuple[Ints, Bools, Floats],
    lengths: list[int],
    rest: list[tuple[Any, ...]],
) -> Group:
    samples: list[Sample] = []
    start = 0
    for length, (spans, *others) in zip(lengths, rest, strict=True):
        stop = start + length
        tokens, loss_mask, rollout_logprobs = columns
        own = tokens[start:stop], loss_mask[start:stop], rollout_logprobs[start:stop]
        samples.append(Sample(*own, tuple(VersionSpan(*span) for span in spans), *others))
        start = stop
    return Group(prompt, tuple(samples))


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one trainer rank learns from in one step: samples as columns.

    Attributes:
        tokens: ids, int32 [T], T = sum(lengths).
        lengths: tokens of each sample, int32 [N].
        loss_mask: True where a token is trained, bool [T].
        rollout_logprobs: as the engine reported them, float32 [T].
        advantages: per token, float32 [T]; 0 outside loss_mask.
        loss_weights: share of each token in the loss, float32 [T]; they sum to 1 over one minibatch with all its
            data-parallel shards. loss = sum(loss_weights * per-token loss).
        rewards: float32 [N].
        versions: oldest weight_version of each sample, int64 [N].
        group_index: which group of the step a sample belongs to, int32 [N].
        num_loss_tokens: trained tokens of the minibatch, over all shards.
        num_samples: samples of the minibatch, over all shards.
        columns: further numbers per token by name, float32 [T] each, as the loss needs them (`ref_logprobs`,
            `teacher_logprobs`, `returns`, ...).
    """

    tokens: Ints
    lengths: Ints
    loss_mask: Bools
    rollout_logprobs: Floats
    advantages: Floats
    loss_weights: Floats
    rewards: Floats
    versions: NDArray[np.int64]
    group_index: Ints
    num_loss_tokens: int
    num_samples: int
    columns: Mapping[str, Floats] = field(default_factory=dict[str, Floats])

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each sample starts in the token columns, and where the last one ends: int64 [N+1]."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def take(self, samples: Iterable[int]) -> "Batch":
        """The batch of these samples alone, in this order. Weights and totals stay as they are."""
        index = np.asarray(list(samples), np.int64)
        starts = self.offsets
        where = np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(starts[i], starts[i + 1], dtype=np.int64) for i in index)]
        )
        per_token = ("tokens", "loss_mask", "rollout_logprobs", "advantages", "loss_weights")
        per_sample = ("lengths", "rewards", "versions", "group_index")
        return replace(
            self,
            **{name: getattr(self, name)[where] for name in per_token},
            **{name: getattr(self, name)[index] for name in per_sample},
            columns={name: column[where] for name, column in self.columns.items()},
        )


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one turn of the loop did.

    Attributes:
        step: number of the step, from 0.
        weight_version: version published at its end.
        metrics: slash names to numbers, as written to metrics.jsonl.
    """

    step: int
    weight_version: int
    metrics: Mapping[str, float]
