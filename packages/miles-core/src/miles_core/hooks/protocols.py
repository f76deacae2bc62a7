"""The protocol of every extension point that is a function: its arguments, what it returns, where it runs.

Those of losses, corrections and KL, which speak torch, are in miles_core.algorithms.losses; that of advantages is in
miles_core.algorithms.advantages.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from miles_core.types import Batch, Group, Ints, Prompt, Sample, StepReport

Judgement = float | Mapping[str, float]
"""A number, or named parts with the total under "reward"."""


class Rollout(Protocol):
    """Decide which groups a step makes, and in which order. Must be `async def`; runs in the rollout worker."""

    async def __call__(
        self, prompts: Sequence[Prompt], make_group: Callable[[Prompt, int], Awaitable[Any]]
    ) -> Sequence[Any]:
        """Return one outcome of `await make_group(prompt, number)` for each prompt, in their order.

        `number` is the prompt's place in the step, from which seeds derive. An outcome is a judged group, or why it was
        dropped; it must be handed on as it is.
        """
        ...


class Generate(Protocol):
    """Make the samples of one prompt. Must be `async def`; runs in the rollout worker."""

    async def __call__(self, prompt: Prompt, seeds: Sequence[int], context: Any) -> Sequence[Sample]:
        """Return one sample per seed, not yet judged; `context` is a miles_rollout.generate.GenerateContext.

        An EngineError drops the group with its reason.
        """
        ...


class Reward(Protocol):
    """Judge one sample. May be `async def`. Returns a number, or named parts with the total under "reward"."""

    def __call__(self, prompt: Prompt, sample: Sample) -> Judgement | Awaitable[Judgement]:
        """Return the reward of `sample`; a raise or a non-finite number loses the sample for it."""
        ...


class GroupReward(Protocol):
    """Judge all samples of a prompt together. May be `async def`. Returns a number or named parts for each."""

    def __call__(
        self, prompt: Prompt, samples: Sequence[Sample]
    ) -> Sequence[Judgement] | Awaitable[Sequence[Judgement]]:
        """Return one judgement per sample, in their order; a raise drops the group with that reason."""
        ...


class SampleFilter(Protocol):
    """Keep a group, or drop it with a reason; before it is judged, when rewards are NaN, or after."""

    def __call__(self, group: Group) -> str | None:
        """Return None to keep the group, or the reason why it is dropped."""
        ...


class DataSource(Protocol):
    """Prompts by position: the same position gives the same prompt, so a cursor is one number."""

    def __call__(self, start: int, count: int) -> Sequence[Prompt]:
        """Return prompts `start` to `start + count` of an endless sequence."""
        ...


class MakesDataSource(Protocol):
    """Open an endless sequence of prompts. Runs in the driver; a class whose objects are data sources will do."""

    is_factory: ClassVar[bool] = True

    def __call__(self, seed: int) -> DataSource:
        """Return the source; `seed` is the run's."""
        ...


class MakesModel(Protocol):
    """Make the Hugging Face directory of `model.path` where it is not there yet. Runs in the driver."""

    is_factory: ClassVar[bool] = True

    def __call__(self, path: Path) -> object:
        """Write the directory; what is returned is not read."""
        ...


class Reduction(Protocol):
    """Say what each token's loss counts: how per-token losses become one number. Runs in the driver."""

    def __call__(self, num_tokens: Ints, group_index: Ints) -> NDArray[np.float64]:
        """Return the weight of a trained token of each sample, float64 [N].

        `num_tokens`, int32 [N], are the trained tokens of each sample of an optimizer update, at least one in all;
        `group_index`, int32 [N], their groups.
        """
        ...


class Metrics(Protocol):
    """Numbers of one's own for each step, from the groups that were trained on."""

    def __call__(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Return slash names and numbers."""
        ...


class AfterModelInit(Protocol):
    """Called in each trainer process once its model has its weights."""

    def __call__(self, model: Any) -> None:
        """Take the list of model chunks; may change them in place."""
        ...


class BeforeLogprobs(Protocol):
    """Called in each trainer process before old logprobs are computed."""

    def __call__(self, batch: Batch) -> None:
        """Take the rank's shard of the step."""
        ...


class BeforeTrainStep(Protocol):
    """Called in each trainer process before the first update of a step."""

    def __call__(self, batch: Batch) -> None:
        """Take the rank's shard of the step."""
        ...


class AfterTrainStep(Protocol):
    """Called in each trainer process after the last update of a step."""

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the step, equal on all ranks."""
        ...


class AfterStep(Protocol):
    """Called in the driver when a step is over: evaluate, log, stop."""

    def __call__(self, report: StepReport, groups: Sequence[Group]) -> None:
        """Take the step's report and the groups that were trained on."""
        ...


class OnCheckpoint(Protocol):
    """Called in the driver once a checkpoint is complete on disk."""

    def __call__(self, step: int, path: Path) -> None:
        """Take the step it was written after, and its folder."""
        ...
