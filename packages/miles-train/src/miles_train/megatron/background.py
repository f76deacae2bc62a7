"""Work of every rank that fails on all if it fails on one: at once, or in a thread beside the training loop."""

import enum
import threading
from collections.abc import Callable

from torch import distributed


def run_on_all(action: Callable[[], object], errors: tuple[type[Exception], ...] = (OSError,)) -> None:
    """Run `action` on every rank; collective.

    Raises:
        OSError: on every rank, where one of `errors` was raised on some; says which and what.
    """
    reason = None
    try:
        action()
    except errors as error:
        reason = str(error)
    reasons: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(reasons, reason)
    failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        raise OSError("; ".join(failed[:4]))


class Outcome(enum.IntEnum):
    """Where work is."""

    DONE = 0
    RUNNING = 1
    FAILED = 2


class Background:
    """A thread that runs an action once."""

    def __init__(self, action: Callable[[], object] | None = None):
        """Start it; without an action it is done."""
        self._error: BaseException | None = None
        self._thread = None
        if action is not None:
            self._thread = threading.Thread(target=self._run, args=(action,), name="checkpoint")
            self._thread.start()

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  # told to the training loop
            self._error = error

    def outcome(self, wait: bool) -> tuple[Outcome, str]:
        """Where it is, and what failed; with `wait`, once it has ended."""
        if wait and self._thread is not None:
            self._thread.join()
        if self._thread is not None and self._thread.is_alive():
            return Outcome.RUNNING, ""
        if self._error is not None:
            return Outcome.FAILED, f"{type(self._error).__name__}: {self._error}"
        return Outcome.DONE, ""


def outcome_of_all(work: Background, wait: bool) -> tuple[Outcome, str]:
    """Failed if it failed on any rank (and why), done if it is on all; collective, the same answer on all ranks."""
    outcomes = [work.outcome(wait)] * distributed.get_world_size()
    distributed.all_gather_object(outcomes, work.outcome(wait))
    failures = [f"rank {rank}: {why}" for rank, (outcome, why) in enumerate(outcomes) if outcome is Outcome.FAILED]
    if failures:
        # Whoever still writes does so into a folder that never gets its name.
        return Outcome.FAILED, "; ".join(failures[:4])
    return max(outcome for outcome, _ in outcomes), ""
