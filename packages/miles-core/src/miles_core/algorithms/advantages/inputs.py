"""What an advantage estimator sees of a step, and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from miles_core.types import Bools, Floats, Ints

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class AdvantageInputs:
    """The samples of a step as columns: N samples of T tokens together.

    Two samples of one group, of three and two tokens, each with its last one trained:

        rewards [1.0, 0.0]    group_index [0, 0]    lengths [3, 2]    loss_mask [F, F, T, F, T]

    Values per token outside loss_mask are anything.

    Attributes:
        rewards: float [N].
        group_index: which group a sample belongs to, int [N], >= 0.
        lengths: tokens of each sample, int [N].
        loss_mask: bool [T]; True where a token is trained.
        reward_parts: named parts of the rewards, float [N] each.
        token_rewards: rewards of single tokens, in addition to `rewards`, float [T]; None for none.
        rollout_logprobs: log probability under the sampling weights, float32 [T]. The attributes from here on are None
            where nothing asked for them, or nobody could say.
        ref_logprobs: the same tokens under a frozen reference, float32 [T].
        teacher_logprobs: the same tokens under a teacher, float32 [T].
        values: what a critic expects from each trained token on, float32 [T].
    """

    rewards: Floats
    group_index: Ints
    lengths: Ints
    loss_mask: Bools
    reward_parts: Mapping[str, Floats] = field(default_factory=dict[str, Floats])
    token_rewards: Floats | None = None
    rollout_logprobs: Floats | None = None
    ref_logprobs: Floats | None = None
    teacher_logprobs: Floats | None = None
    values: Floats | None = None

    @classmethod
    def of_rewards(cls, groups: Sequence[ArrayLike]) -> Self:
        """Groups of samples of one trained token each, given the rewards [G] of each group: for trying things out."""
        rewards = [np.asarray(group, np.float32) for group in groups]
        group_index = np.repeat(np.arange(len(rewards)), [len(group) for group in rewards]).astype(np.int32)
        ones = np.ones(len(group_index), np.int32)
        return cls(np.concatenate([np.zeros(0, np.float32), *rewards]), group_index, ones, ones.astype(np.bool_))

    def replace(self, **changes: object) -> Self:
        """A copy with `changes` applied."""
        return replace(self, **changes)

    def column(self, name: str) -> Doubles:
        """An optional column in float64, 0 outside loss_mask.

        Raises:
            ValueError: it is not there.
        """
        column: Floats | None = getattr(self, name)
        if column is None:
            raise ValueError(f'inputs.{name} is None: an estimator that reads it must say so with @needs("{name}")')
        return np.where(self.loss_mask, column, 0.0).astype(np.float64)

    @property
    def sample_index(self) -> NDArray[np.int64]:
        """Which sample a token belongs to, int64 [T]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def totals(self) -> Doubles:
        """All that each sample earned, its tokens' own rewards included, float64 [N]."""
        totals = self.rewards.astype(np.float64)
        if self.token_rewards is None:
            return totals
        return totals + np.bincount(self.sample_index, self.column("token_rewards"), minlength=len(totals))

    def rewards_by_token(self) -> Doubles:
        """The reward of each token, float64 [T]: its own, and at the last trained token the sample's."""
        by_token = np.zeros(len(self.loss_mask)) if self.token_rewards is None else self.column("token_rewards")
        trained = np.flatnonzero(self.loss_mask)
        sample_index = self.sample_index[trained]
        is_last = np.append(sample_index[1:] != sample_index[:-1], True)[: len(trained)]
        by_token[trained[is_last]] += self.rewards[sample_index[is_last]]
        return by_token

    def spread(self, per_sample: Doubles) -> Doubles:
        """A number per sample [N] at each of its trained tokens, 0 elsewhere, [T]."""
        return np.where(self.loss_mask, per_sample[self.sample_index], 0.0)


class Estimates(NamedTuple):
    """Advantages together with what a critic learns from.

    Attributes:
        advantages: float32, [N] or [T].
        returns: what the critic should have said at each trained token, float32 [T].
    """

    advantages: Floats
    returns: Floats


class Advantage(Protocol):
    """Estimate how much better than expected each sample, or each token, was. Runs in the driver.

    An estimator that reads columns which have to be computed for it names them: `@needs("values")` (see
    miles_core.algorithms.needs).
    """

    def __call__(self, inputs: AdvantageInputs) -> Floats | Estimates:
        """Return advantages, float32: one per sample [N], or one per token [T]; with returns, if there is a critic."""
        ...
