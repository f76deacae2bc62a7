"""Life and death of engine processes, with the standard library alone: imported before anything heavy."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with(ancestor_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone.

    The signal comes when the THREAD that started this process ends: start it from a thread that lives as long.

    Args:
        ancestor_pid: the parent, or one whose descendants all die with their parents. If it, or anyone between, died
            before this call, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    pid = os.getpid()
    while pid not in (0, ancestor_pid):
        pid = _parent(pid)
    if pid == 0:
        os._exit(1)


def _parent(pid: int) -> int:
    """The parent's pid; 0 above the first process, or if `pid` is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # "pid (name) state ppid ...", and the name may hold anything but ends with the last parenthesis.
            return int(file.read().rpartition(")")[2].split()[1])
    except FileNotFoundError:
        return 0


class Secret(str):
    """A string that does not show when an object that holds it is printed: SGLang logs its arguments at start."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Stars."""
        return "'***'"
