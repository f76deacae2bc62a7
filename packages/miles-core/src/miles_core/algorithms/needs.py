"""What code asks for beyond what it always gets."""

from collections.abc import Callable
from typing import Any


def needs[F: Callable[..., Any]](*columns: str) -> Callable[[F], F]:
    """Mark a function as a reader of optional columns, e.g. `@needs("ref_logprobs")`."""

    def mark(code: F) -> F:
        code.needs = frozenset(columns)  # pyright: ignore[reportFunctionMemberAccess]
        return code

    return mark


def needs_of(code: Any) -> frozenset[str]:
    """The optional columns that a loss, correction or advantage estimator reads: its attribute `needs`, if any."""
    return frozenset(getattr(code, "needs", ()))
