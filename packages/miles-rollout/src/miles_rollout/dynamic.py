"""Dynamic sampling: a step gets the groups that it wants, whatever is dropped on the way.

Dropped groups (no variance in their rewards, failures) are made up for with further prompts, as DAPO does
(arXiv:2503.14476, section 3.2). Where more prompts are given than groups are wanted, the first that are ready make the
step and the rest is ended: no waiting for the longest, at the price of a bias towards short responses.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from miles_core.types import Prompt

More = Callable[[int], Awaitable[Sequence[Prompt]]]
"""Takes a number; returns as many further prompts of the step, or fewer where there are no more."""


@dataclass(frozen=True, slots=True)
class DynamicSampling:
    """How many groups a step wants, and what may be done about it.

    Attributes:
        wanted: groups of the step.
        more: where further prompts come from; None makes do with those given.
        max_prompts: most prompts of the step, those given included: a policy that has solved everything would go
            through the data for ever. Then the step has fewer groups.
    """

    wanted: int
    more: More | None = None
    max_prompts: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.wanted < 1:
            raise ValueError(f"wanted = {self.wanted}: a step needs a group at least")
        if self.more is not None and self.max_prompts < self.wanted:
            raise ValueError(f"max_prompts = {self.max_prompts}: must be at least wanted = {self.wanted}")

    def missing(self, num_expected: int, num_handed: int) -> int:
        """How many further prompts to take, given the groups kept or on their way and the prompts handed out."""
        return 0 if self.more is None else max(0, min(self.wanted - num_expected, self.max_prompts - num_handed))

    async def take(self, count: int) -> Sequence[Prompt]:
        """Further prompts, `count` at most."""
        assert self.more is not None
        return (await self.more(count))[:count]
