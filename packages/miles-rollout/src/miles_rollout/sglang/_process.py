"""Life and death of engine processes, with the standard library alone: imported before anything heavy."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone.

    The signal comes when the THREAD that started this process ends: start it from a thread that lives as long.

    Args:
        parent_pid: who must be alive. If it died before the call, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


class Secret(str):
    """A string that does not show when an object that holds it is printed: SGLang logs its arguments at start."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Stars."""
        return "'***'"
