"""Errors of generation. What a caller may catch is here; a user's mistake is miles_core's InputError."""

from miles_core.errors import RoleDied, RolloutError


class EngineError(RolloutError):
    """An engine did not answer, or answered with something that cannot be learned from.

    Attributes:
        reason: a few words, the same for the same cause, for counting.
    """

    def __init__(self, reason: str, detail: str = ""):
        """Compose the message from the countable reason and what is known besides."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["EngineError"], tuple[str, str]]:
        """Survive the trip out of an actor."""
        return type(self), (self.reason, self.detail)


class EngineUnavailable(EngineError):
    """The engine cannot be reached, is overloaded or broke off: the same request may succeed later."""


class EngineStartError(RoleDied):
    """An engine could not start; the message carries the end of its log."""


class EngineDied(RoleDied):
    """A running engine, or one of its processes, is gone; the message names which."""
