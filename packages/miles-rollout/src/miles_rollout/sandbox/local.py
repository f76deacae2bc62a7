"""The sandbox of this host: Linux namespaces, limits, a filter of system calls. `_launcher` makes it, from within.

What the command gets: the host's /usr and one Python, read-only; a folder in memory; an empty network, no other
process in sight, no environment, the rights of nobody. What it does not get around: the kernel that it shares with
the host. Needs Linux 5.14 and user namespaces.
"""

import asyncio
import base64
import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from miles_rollout._processes import MARK, descendants, end_tree, memory_of
from miles_rollout.sandbox import seccomp
from miles_rollout.sandbox.types import Ending, Limits, Result, SandboxUnavailable

_LAUNCHER = Path(__file__).with_name("_launcher.py")
_LOOK_EVERY_S = 0.05
# The launcher and its two helpers, which are no business of the command's limit.
_OWN_BYTES, _OWN_PROCESSES = 32 << 20, 3
_READ_ONLY = ("/usr", "/bin", "/sbin", "/lib", "/lib64")


class LocalSandbox:
    """Runs commands on this host: in namespaces, or, for who says so, in nothing but a process with limits."""

    def __init__(self, *, isolate: bool = True, at_once: int | None = None):
        """Nothing is started yet.

        Args:
            isolate: False gives the command your files, your network and your processes.
            at_once: commands that run at the same time; others wait. By default, one a processor.
        """
        self._isolate = isolate
        self._at_once = at_once or len(os.sched_getaffinity(0))
        self._turns: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    async def run(
        self, files: Mapping[str, str | bytes], command: Sequence[str], stdin: str | bytes, limits: Limits
    ) -> Result:
        """See Sandbox.run.

        Raises:
            SandboxUnavailable: the host denies a namespace or a mount.
            ValueError: a file's name leads out of the folder.
        """
        setup = self._setup(files, command, limits)
        async with self._turn():
            with tempfile.TemporaryDirectory(prefix="miles-sandbox-", ignore_cleanup_errors=True) as folder:
                return await _Run(setup, limits, _bytes(stdin), folder).result()

    def _turn(self) -> asyncio.Semaphore:
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:  # a semaphore belongs to a loop
            self._turns = (loop, asyncio.Semaphore(self._at_once))
        return self._turns[1]

    def _setup(self, files: Mapping[str, str | bytes], command: Sequence[str], limits: Limits) -> dict[str, Any]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"file {name!r}: give a relative name inside the folder")
        python = Path(sys.base_prefix)
        home = "/tmp/work" if self._isolate else "."
        return {
            "isolate": self._isolate,
            "owner_pid": os.getpid(),
            "files": {name: base64.b64encode(_bytes(content)).decode() for name, content in files.items()},
            "command": list(command),
            "read_only": [*_READ_ONLY, *([] if python.is_relative_to("/usr") else [str(python)])],
            "environment": {
                "PATH": f"{python}/bin:/usr/local/bin:/usr/bin:/bin",
                "HOME": home,
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
            "processes": limits.processes,
            "cpu_s": math.ceil(limits.timeout_s * limits.processes),
            "seccomp": base64.b64encode(seccomp.program()).decode(),
        }


class _Run:
    """One command from its start to its end."""

    def __init__(self, setup: dict[str, Any], limits: Limits, stdin: bytes, folder: str):
        self._setup, self._limits, self._stdin, self._folder = setup, limits, stdin, folder
        self._said: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._ended: set[str] = set()
        self._quiet = asyncio.Event()
        self._mark = secrets.token_hex(16)

    async def result(self) -> Result:
        start = time.monotonic()
        report_read, report_write = os.pipe()
        with open(report_read, "rb") as report:
            process = self._start(report_write)
            try:
                ended = await self._watch(process, start)
            finally:
                self._end(process)
            words = report.read()
        exit_code = self._exit_code(words, ended)
        stdout, stderr = (bytes(said[: self._limits.output_bytes]) for said in self._said.values())
        return Result(ended, exit_code, stdout, stderr, time.monotonic() - start)

    def _start(self, report_fd: int) -> subprocess.Popen[bytes]:
        fds = [_memory_file(data) for data in (json.dumps(self._setup).encode(), self._stdin)]
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", str(_LAUNCHER), str(fds[0]), str(report_fd)],
                stdin=fds[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[fds[0], report_fd],
                env={MARK: self._mark},
                cwd=self._folder,
                start_new_session=True,
            )
        finally:
            for fd in (*fds, report_fd):
                os.close(fd)

    async def _watch(self, process: subprocess.Popen[bytes], start: float) -> Ending:
        """Collect what is said and look at the limits until the launcher, which holds the pipes as well, has ended."""
        loop = asyncio.get_running_loop()
        fds = {name: getattr(process, name).fileno() for name in self._said}
        for name, fd in fds.items():
            loop.add_reader(fd, self._read, name, fd)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._quiet.wait(), _LOOK_EVERY_S)
                if self._too_much_said():
                    return "output"
                if self._quiet.is_set() or process.poll() is not None:
                    return "exit"
                if (limit := self._exceeded(process.pid, start)) is not None:
                    return limit
        finally:
            for fd in fds.values():
                loop.remove_reader(fd)

    def _read(self, name: str, fd: int) -> None:
        piece = os.read(fd, 1 << 16)
        self._said[name] += piece
        if not piece:
            asyncio.get_running_loop().remove_reader(fd)
            self._ended.add(name)
        if len(self._ended) == len(self._said) or self._too_much_said():
            self._quiet.set()

    def _too_much_said(self) -> bool:
        return sum(map(len, self._said.values())) > self._limits.output_bytes

    def _exceeded(self, pid: int, start: float) -> Ending | None:
        if time.monotonic() > start + self._limits.timeout_s:
            return "timeout"
        below = descendants(pid)
        if memory_of([pid, *below]) > self._limits.memory_bytes + _OWN_BYTES:
            return "memory"
        # In a user namespace the kernel counts, and a program that wants more gets an error; but not where the id of
        # the host's root is the only one to be had.
        return "processes" if len(below) > self._limits.processes + _OWN_PROCESSES else None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        if self._setup["isolate"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # init among them, whose end is the end of its namespace
        else:
            end_tree(process.pid, self._mark)
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()

    def _exit_code(self, words: bytes, ended: Ending) -> int:
        report = json.loads(words.splitlines()[0]) if words else {}
        if "error" in report:
            raise SandboxUnavailable("sandbox", "local", f"cannot run here ({report['error']})", _WAY_OUT)
        if "exit" not in report and ended == "exit":
            said = bytes(self._said["stderr"])[-500:].decode(errors="replace").strip()
            raise SandboxUnavailable("sandbox", "local", f"its launcher ended: {said}", _WAY_OUT)
        return report.get("exit", -9)


_WAY_OUT = (
    "Allow user namespaces on this host (sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces, "
    "kernel.apparmor_restrict_unprivileged_userns; containers: seccomp=unconfined), name a sandbox of your own, or, "
    "where the code may have all that you have, say allow_untrusted_exec = true."
)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _memory_file(data: bytes) -> int:
    """A file that exists in memory alone, at its beginning: a pipe would fill up."""
    fd = os.memfd_create("miles-sandbox")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
