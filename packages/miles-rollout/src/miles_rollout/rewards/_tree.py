"""Which processes a process has started, from /proc."""

import contextlib
from pathlib import Path


def descendants(root: int) -> list[int]:
    """Pids of the children of `root`, theirs, and so on; in no order. Takes a millisecond or two."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                # "pid (name) state ppid ...", and the name may hold anything but ends with the last parenthesis.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found
