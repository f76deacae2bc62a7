"""What a sandbox is: a command over a few files, run where it can do no harm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from miles_core.errors import InputError

type Ending = Literal["exit", "timeout", "output", "memory", "processes"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one command may use.

    Attributes:
        timeout_s: wall-clock seconds.
        memory_bytes: of all its processes together; address space of each of them.
        disk_bytes: of its files, which are in memory.
        output_bytes: of stdout and stderr together.
        processes: that it may have at the same time, threads counted.
    """

    timeout_s: float = 5.0
    memory_bytes: int = 512 << 20
    disk_bytes: int = 64 << 20
    output_bytes: int = 1 << 20
    processes: int = 32


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended.

    Attributes:
        ended: "exit" if it did by itself, else the limit that it was killed at.
        exit_code: of the command, 127 if there is none of that name; minus the signal's number if one ended it, also
            where a limit did.
        stdout: what it wrote, up to the limit.
        stderr: the same.
        wall_s: seconds, the sandbox's own start included.
    """

    ended: Ending
    exit_code: int
    stdout: bytes
    stderr: bytes
    wall_s: float

    @property
    def ok(self) -> bool:
        """It ended by itself, with 0."""
        return self.ended == "exit" and self.exit_code == 0


class Sandbox(Protocol):
    """Runs commands that nobody vouches for. Each run starts from nothing and leaves nothing."""

    async def run(
        self, files: Mapping[str, str | bytes], command: Sequence[str], stdin: str | bytes, limits: Limits
    ) -> Result:
        """Run `command` in a folder that holds `files`.

        Args:
            files: relative name to content.
            command: program and arguments; "python3" is a Python of the standard library alone.
            stdin: what the command reads.
            limits: it is killed at.

        Raises:
            SandboxUnavailable: no sandbox could be made, so nothing ran.
        """
        ...


class SandboxUnavailable(InputError):
    """This host denies what the sandbox is made of."""
