"""Reward code in processes that can be killed.

    judge ──▶ idle process ──Call──▶ running ──last Verdict──▶ idle
                                        │ too slow, too much output, too many processes, gone
                                        └──▶ killed with all it started ──▶ a new one at the next call

A process has a session of its own, an environment without the owner's secrets, an address space limit, and stdout and
stderr that are counted and thrown away. It is not a sandbox: the code has the user's files and network. It is code that
the user chose to run.
"""

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from miles_core.errors import InputError
from miles_core.types import Prompt, Sample
from miles_rollout._processes import MARK, descendants, end_tree, has_children, memory_of
from miles_rollout.rewards import _wire
from miles_rollout.rewards.judge import Verdict

# What a process may see of the owner's environment: where programs and libraries are, and how to speak. Keys and
# tokens are not among it.
_INHERITED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
# Between looks at how many processes a call has started and at their memory.
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What reward code may use.

    Attributes:
        processes: that judge at the same time.
        timeout_s: wall-clock limit for one sample.
        memory_bytes: that one process may allocate on top of the interpreter's own, address space counted; and that it
            may have together with all that it started.
        max_output_bytes: that one call may print.
        max_processes: that one call may have running.
        start_timeout_s: limit for the start, the import of the reward's module included.
    """

    processes: int = 1
    timeout_s: float = 10.0
    memory_bytes: int = 1 << 30
    max_output_bytes: int = 1 << 20
    max_processes: int = 64
    start_timeout_s: float = 60.0


class RewardPool:
    """A Judge whose reward runs in killable processes. Belongs to one event loop."""

    def __init__(
        self,
        reward: str,
        params: Mapping[str, Any] | None = None,
        settings: PoolSettings | None = None,
        *,
        group: bool = False,
    ):
        """Nothing is started yet.

        Args:
            reward: "package.module:name".
            params: keyword arguments for every call; JSON-able.
            settings: limits.
            group: it is a GroupReward; a group then counts as one sample where limits and kills are concerned.
        """
        self._group = group
        self._reward = reward
        self._params = dict(params or {})
        self._settings = settings or PoolSettings()
        self._idle: asyncio.Queue[_Process | None] = asyncio.Queue()
        self._all: set[_Process] = set()
        for _ in range(self._settings.processes):
            self._idle.put_nowait(None)

    async def start(self) -> None:
        """Start one process now, so that a reward that cannot be loaded is an error before anything is generated.

        Raises:
            InputError: the reward cannot be imported, cannot be called as a Reward, or did not start in time.
        """
        process = await self._idle.get()
        try:
            process = process or await self._new()
        finally:
            self._idle.put_nowait(process)

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        """See Judge.judge. After a sample whose process had to be killed, another process judges those that are left.

        Not so after the third of a group: each costs the time limit and a start.

        Raises:
            InputError: a process could not be started.
        """
        verdicts: list[Verdict] = []
        kills = 0
        while len(verdicts) < len(samples) and kills < _MOST_KILLS:
            verdicts += await self._judge_until_killed(prompt, samples[len(verdicts) :])
            killed = verdicts[-1].failure in _FATAL
            if killed and self._group:
                return [verdicts[-1]] * len(samples)
            kills += killed
        if len(verdicts) < len(samples):
            missing = Verdict(failure=verdicts[-1].failure, detail=f"not judged: {kills} of its group were killed")
            verdicts += [missing] * (len(samples) - len(verdicts))
        return verdicts

    async def _judge_until_killed(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        process = await self._idle.get()
        usable = False
        try:
            process = process or await self._new()
            verdicts = await process.judge(prompt, samples)
            usable = verdicts[-1].failure not in _FATAL
        finally:
            if process is not None and not usable:
                self._end(process)
            self._idle.put_nowait(process if usable else None)
        return verdicts

    async def close(self) -> None:
        """Kill all processes."""
        for process in list(self._all):
            self._end(process)

    async def _new(self) -> "_Process":
        process = _Process(self._reward, self._group, self._params, self._settings)
        self._all.add(process)
        try:
            await process.start()
        except BaseException:
            self._end(process)
            raise
        return process

    def _end(self, process: "_Process") -> None:
        self._all.discard(process)
        process.kill()


# In one group.
_MOST_KILLS = 3
# After these a process is not used again.
_FATAL = frozenset({
    "reward timeout", "reward output", "reward processes", "reward process died", "reward out of memory",
})  # fmt: skip


@dataclass(eq=False)
class _Process:
    reward: str
    group: bool
    params: dict[str, Any]
    settings: PoolSettings
    _process: subprocess.Popen[bytes] | None = None
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None
    _printed: int = 0
    _last_verdict: float = 0.0
    _last_print: bytes = b""
    _own_bytes: int = 0
    _mark: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", MARK: self._mark}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "miles_rollout.rewards._process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        asyncio.get_running_loop().add_reader(self._output_fd(), self._count_output)
        paths = [os.path.abspath(path) for path in sys.path]
        self._writer.write(
            _wire.pack(
                _wire.Setup(self.reward, self.group, self.params, paths, self.settings.memory_bytes, os.getpid())
            )
        )
        try:
            ready = await asyncio.wait_for(self._receive(_wire.Ready), self.settings.start_timeout_s)
            error = ready.error
        except TimeoutError:
            error = f"its module was not imported after {self.settings.start_timeout_s:g} s"
        except (OSError, asyncio.IncompleteReadError):
            error = f"its process ended while importing it: {self._last_words()}"
        if error:
            setting = "hooks.group_reward" if self.group else "hooks.reward"
            raise InputError(setting, self.reward, f"cannot be loaded ({error})", "Mend or rename it.")
        self._own_bytes = memory_of([self.pid])

    async def judge(self, prompt: Prompt, samples: Sequence[Sample]) -> list[Verdict]:
        """Verdicts up to the first that is fatal to the process."""
        assert self._writer is not None
        self._printed = 0
        self._writer.write(_wire.pack(_wire.call_of(prompt, list(samples))))
        verdicts: list[Verdict] = []
        self._last_verdict = time.monotonic()
        collecting = asyncio.create_task(self._collect(verdicts, len(samples)))
        try:
            failure = await self._watch(collecting)
        finally:
            collecting.cancel()
        # What is found out after the last verdict is held against the last sample.
        return verdicts if failure is None else [*verdicts[: len(samples) - 1], failure]

    async def _collect(self, verdicts: list[Verdict], count: int) -> None:
        while len(verdicts) < count:
            reply = await self._receive(_wire.Reply)
            verdicts.append(Verdict(reply.reward, reply.parts, reply.failure, reply.detail))
            self._last_verdict = time.monotonic()
            if reply.failure in _FATAL:
                return

    async def _watch(self, collecting: asyncio.Task[None]) -> Verdict | None:
        """Look at the limits until all verdicts are there; what was exceeded, if anything."""
        limits = self.settings
        while True:
            left = self._last_verdict + limits.timeout_s - time.monotonic()
            done, _ = await asyncio.wait([collecting], timeout=min(_LOOK_EVERY_S, max(left, 0)))
            if self._printed > limits.max_output_bytes:
                return self._failure("reward output", f"printed more than {limits.max_output_bytes} bytes")
            if not done and time.monotonic() >= self._last_verdict + limits.timeout_s:
                return self._failure("reward timeout", f"took longer than {limits.timeout_s:g} s")
            # Also when all is done: what a short call leaves running adds up over many.
            if has_children(self.pid) and (failure := self._exceeded()) is not None:
                return failure
            if done:
                break
        try:
            collecting.result()
        except (OSError, asyncio.IncompleteReadError, msgspec.DecodeError):
            return self._failure("reward process died", self._last_words())
        return None

    def _exceeded(self) -> Verdict | None:
        limits, below = self.settings, descendants(self.pid)
        if len(below) > limits.max_processes:
            return self._failure("reward processes", f"started more than {limits.max_processes} processes")
        if memory_of([self.pid, *below]) > self._own_bytes + limits.memory_bytes:
            detail = f"has more than {limits.memory_bytes} bytes with all that it started"
            return self._failure("reward out of memory", detail)
        return None

    def kill(self) -> None:
        """Kill the process and everything it started, and see it gone."""
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._output_fd())
            assert self._process.stdout is not None
            self._process.stdout.close()
            end_tree(self.pid, self._mark)
            self._process.wait()
            self._process = None
        if self._writer is not None:
            self._writer.close()

    async def _receive[T: msgspec.Struct](self, kind: type[T]) -> T:
        assert self._reader is not None
        length = int.from_bytes(await self._reader.readexactly(_wire.HEADER_BYTES))
        if length > _wire.MAX_REPLY_BYTES:
            raise msgspec.DecodeError(f"a reply of {length} bytes")
        return msgspec.msgpack.decode(await self._reader.readexactly(length), type=kind)

    def _output_fd(self) -> int:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.fileno()

    def _count_output(self) -> None:
        piece = os.read(self._output_fd(), 1 << 16)
        self._printed += len(piece)
        self._last_print = (self._last_print + piece)[-2000:]
        if not piece:
            asyncio.get_running_loop().remove_reader(self._output_fd())

    def _failure(self, failure: str, detail: str) -> Verdict:
        return Verdict(failure=failure, detail=f"{self.reward}: {detail}")

    def _last_words(self) -> str:
        lines = self._last_print.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"
