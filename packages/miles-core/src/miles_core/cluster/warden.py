"""A small process that outlives the driver by a moment and leaves no orphan behind.

Ray's agents notice the death of their raylet only after most of a minute, and a killed driver cannot stop its
engines. The driver puts a mark into its environment, which everything that it starts inherits, and starts the warden
with a pipe: when the pipe closes (the driver is done, or was killed), the warden ends every process that carries the
mark.

Run as a file, not as a module: it must start in milliseconds and needs the standard library alone.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

MARK = "MILES_RUN_MARK"  # environment variable that all processes of one driver share
GRACE_S = 3.0  # after a clean stop, processes that are about to end by themselves get this long
SWEEP_DEADLINE_S = 30.0


@contextlib.contextmanager
def warden() -> Generator[str]:
    """Mark this process's environment and have everything that inherits it ended when this process is gone.

    Yields:
        The mark.
    """
    mark = secrets.token_hex(16)
    os.environ[MARK] = mark
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", __file__, mark],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for the driver
        env={},
    )
    try:
        yield mark
    finally:
        os.environ.pop(MARK, None)
        assert process.stdin is not None
        process.stdin.write(b"clean")
        process.stdin.close()
        process.wait(SWEEP_DEADLINE_S + GRACE_S)


def marked(mark: str) -> list[int]:
    """Ids of the living processes that carry `mark`, other than this one and the driver that made it."""
    found: list[int] = []
    entry = f"{MARK}={mark}".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _guard(mark: str) -> None:
    """Wait for the driver's end of the pipe to close, then sweep until two looks in a row find nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    clean = sys.stdin.buffer.read() == b"clean"
    patience = time.monotonic() + (GRACE_S if clean else 0)
    deadline = time.monotonic() + SWEEP_DEADLINE_S
    empty_looks = 0
    while empty_looks < 2 and time.monotonic() < deadline:
        found = marked(mark)
        empty_looks = 0 if found else empty_looks + 1
        if time.monotonic() >= patience:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    _guard(sys.argv[1])
