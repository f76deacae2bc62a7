"""Which processes a process has started, what they use, and how to be rid of them; all from /proc."""

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# An environment variable whose value is inherited by everything that a process starts, unless it takes care.
MARK = "MILES_PROCESS_MARK"
_SWEEP_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Entry:
    pid: int
    parent: int
    session: int
    zombie: bool


def descendants(root: int) -> list[int]:
    """Pids of the living children of `root`, theirs, and so on; in no order. Takes a millisecond or two."""
    return [entry.pid for entry in _below(root, _table()) if not entry.zombie]


def has_children(pid: int) -> bool:
    """Whether a process has any; a hundred times cheaper than `descendants`."""
    with contextlib.suppress(OSError):
        return any((task / "children").read_bytes() for task in Path(f"/proc/{pid}/task").iterdir())
    return False


def memory_of(pids: Iterable[int]) -> int:
    """Bytes of memory that these processes have between them; what several share counts once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended meanwhile, or is somebody else's
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
    return total


def end_tree(root: int, mark: str) -> list[int]:
    """Kill a leader of a session and everything it started, also what left its session or lost its parent.

    Args:
        root: not waited for yet by its owner, so that its pid is its own.
        mark: value of MARK in its environment.

    Returns:
        Those that were still there after five seconds: processes that cannot be killed, or more than can be counted.
    """
    with contextlib.suppress(ProcessLookupError):
        os.kill(root, signal.SIGSTOP)  # it starts nothing any more, and keeps what it started findable
    strays = [entry.pid for entry in _below(root, _table())]
    # The group in one blow, so that a process that forks without end cannot outrun it; then who left the group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(root, signal.SIGKILL)
    deadline = time.monotonic() + _SWEEP_DEADLINE_S
    left = _kill(strays)
    while (left := _kill(_related(root, mark, left))) and time.monotonic() < deadline:
        time.sleep(0.002)
    return left


def _kill(pids: Iterable[int]) -> list[int]:
    killed: list[int] = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    return killed


def _related(root: int, mark: str, killed: list[int]) -> list[int]:
    """Living processes of the session, below those killed last, or with the mark."""
    table = [entry for entry in _table() if entry.pid != root and not entry.zombie]
    pids = {entry.pid for entry in table}
    found = {entry.pid for entry in table if entry.session == root or entry.parent in killed}
    found |= pids & set(killed)
    wanted = f"{MARK}={mark}".encode()
    for pid in pids - found:
        with contextlib.suppress(OSError):
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.add(pid)
    return sorted(found)


def _below(root: int, table: list[_Entry]) -> list[_Entry]:
    children: dict[int, list[_Entry]] = {}
    for entry in table:
        children.setdefault(entry.parent, []).append(entry)
    found: list[_Entry] = []
    waiting = [root]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += [entry.pid for entry in mine]
    return found


def _table() -> list[_Entry]:
    entries: list[_Entry] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                # "pid (name) state ppid group session ...", and the name may hold anything but ends with the last
                # parenthesis.
                state, parent, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                entries.append(_Entry(int(folder.name), int(parent), int(session), state in "ZX"))
    return entries
