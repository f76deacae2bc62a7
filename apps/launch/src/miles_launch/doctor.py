"""Whether this machine can run Miles: what `miles doctor` prints and every start checks.

Nothing heavy is imported: the answer takes a fraction of a second.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from miles_core import InputError
from miles_core.ports import port_is_free

MIB, GIB = 1 << 20, 1 << 30

# Ray's object store takes 256 MiB of it, weights on their way to an engine take their own size. Where it is smaller
# both fall back to slower ways.
MIN_SHM_BYTES = 512 * MIB
# A run of the tiny model writes a few MB. Of a real one a checkpoint takes some 14 bytes a parameter, and two are kept.
MIN_RUNS_DISK_BYTES = 1 * GIB
# Ray keeps its logs there, 5 MB a run, and what its object store cannot hold.
MIN_TEMP_DISK_BYTES = 1 * GIB
# Ray, an engine, a trainer, a worker, the queue and the driver took 2.9 GiB at their peak with the tiny model.
MIN_MEMORY_BYTES = 4 * GIB
MIN_CORES = 2
# Ray and SGLang raise the soft limit themselves, up to the hard one. Ray warns below this.
MIN_OPEN_FILES = 4096
# What the path of a Unix socket may have: sockaddr_un of Linux, less its closing zero.
MAX_SOCKET_PATH_BYTES = 107
# The longest such path of Ray, below the temporary directory; 4194304 is the highest process id of Linux.
RAY_SOCKET_PATH = "/miles-ray-{uid}/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
PYTHON_VERSIONS = ((3, 12), (3, 13))

# Upstreams inside the processes of a run, and the package of ours (with its extra) that says which versions of them it
# was tested with.
ENGINES = {
    "torch": ("miles-train", ""),
    "transformers": ("miles-rollout", ""),
    "sglang": ("miles-rollout", "sglang"),
    "megatron-core": ("miles-train", "megatron"),
    "ray": ("miles-core", "ray"),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing about this machine.

    Attributes:
        name: what was looked at.
        ok: whether the rule holds.
        value: what was found.
        rule: what should hold.
        way_out: what to do where it does not.
        required: whether a run is refused where it does not, instead of warned about.
    """

    name: str
    ok: bool
    value: str
    rule: str
    way_out: str
    required: bool = True


def checks(runs_dir: Path, ports: Mapping[str, int]) -> list[Check]:
    """Look at everything. On another platform than Linux x86-64 that is the only finding.

    Args:
        runs_dir: folder that holds the folders of runs; need not exist yet.
        ports: loopback ports that a run listens on, by the recipe key that sets them; 0 is not looked at.
    """
    here = _platform()
    if not here.ok:
        return [here]
    return [
        here,
        _python(),
        *map(_engine, ENGINES),
        _memory(),
        _shared_memory(),
        _disk("disk of runs", runs_dir, MIN_RUNS_DISK_BYTES, "Free some, or name another folder with --runs."),
        _disk("disk of temporary files", Path(tempfile.gettempdir()), MIN_TEMP_DISK_BYTES, "Free some, or set TMPDIR."),
        _temporary_path(),
        *_ports(ports),
        _cores(),
        _open_files(),
    ]


def refuse_unfit_machine(runs_dir: Path, ports: Mapping[str, int]) -> list[Check]:
    """Look at everything and stop at the first thing that a run cannot do without.

    Returns:
        What is wrong but can be lived with, to be shown as warnings.

    Raises:
        InputError: a required check failed.
    """
    wrong = [check for check in checks(runs_dir, ports) if not check.ok]
    for check in wrong:
        if check.required:
            raise InputError(check.name, check.value, check.rule, check.way_out)
    return wrong


def print_report(runs_dir: Path, ports: Mapping[str, int]) -> int:
    """Print every check to the terminal.

    Returns:
        The exit code: 0, or that of `InputError` if a required check failed.
    """
    found = checks(runs_dir, ports)
    table = Table("", "what", "found", "rule", box=None)
    for check in found:
        mark = "[green]ok[/]" if check.ok else "[red]no[/]" if check.required else "[yellow]hm[/]"
        table.add_row(mark, check.name, check.value, check.rule)
    terminal = Console()
    terminal.print(table)
    wrong = [check for check in found if not check.ok]
    for check in wrong:
        terminal.print(f"{check.name}: {check.way_out}", highlight=False)
    return InputError.exit_code if any(check.required for check in wrong) else 0


def _platform() -> Check:
    here = (sys.platform, platform.machine())
    return Check(
        "platform",
        here == ("linux", "x86_64"),
        " ".join(here),
        "Miles runs on Linux x86-64, for which its engines are released",
        "Use such a machine, virtual ones included.",
    )


def _python() -> Check:
    first, last = (".".join(map(str, version)) for version in PYTHON_VERSIONS)
    return Check(
        "python",
        sys.version_info[:2] in PYTHON_VERSIONS,
        platform.python_version(),
        f"{first} to {last}",
        f"Install Python {first}; uv finds it by .python-version.",
    )


def _engine(name: str) -> Check:
    wanted = _requirement(name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return Check(
        name,
        bool(version) and wanted.specifier.contains(version, prereleases=True),
        version or "not installed",
        f"{wanted.specifier}, says {ENGINES[name][0]}",
        f'Start with `uv run`, which installs what the lock says, or pip install "{name}{wanted.specifier}".',
    )


def _requirement(name: str) -> Requirement:
    package, extra = ENGINES[name]
    for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
        marker = requirement.marker
        if requirement.name == name and (marker is None or marker.evaluate({"extra": extra})):
            return requirement
    raise AssertionError(f"{package}[{extra}] does not require {name}")


def _memory() -> Check:
    available = min(psutil.virtual_memory().available, *_memory_limits())
    return Check(
        "memory",
        available >= MIN_MEMORY_BYTES,
        f"{available / GIB:.1f} GiB available",
        f"at least {MIN_MEMORY_BYTES / GIB:g} GiB",
        "Close other programs, or raise the limit of this container.",
    )


def _memory_limits() -> Iterator[float]:
    """What a container may take at most (control groups, version 2 and 1). Its use so far counts caches and is left."""
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            yield float(Path("/sys/fs/cgroup", file).read_text())
        except (OSError, ValueError):  # no such control group, or "max"
            yield float("inf")


def _shared_memory() -> Check:
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return Check(
        "/dev/shm",
        free >= MIN_SHM_BYTES,
        f"{free / GIB:.1f} GiB free",
        f"at least {MIN_SHM_BYTES / GIB:g} GiB, else objects go through files and weights through sockets",
        "Start the container with a larger --shm-size, or remove what is left in /dev/shm.",
        required=False,
    )


def _disk(name: str, folder: Path, need: int, way_out: str) -> Check:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    return Check(
        name,
        writable and free >= need,
        f"{free / GIB:.1f} GiB free in {existing}" if writable else f"{existing} cannot be written",
        f"at least {need / GIB:g} GiB",
        way_out,
    )


def _temporary_path() -> Check:
    folder = tempfile.gettempdir()
    room = MAX_SOCKET_PATH_BYTES - len(RAY_SOCKET_PATH.format(uid=os.getuid()))
    return Check(
        "path of temporary files",
        len(os.fsencode(folder)) <= room,
        folder,
        f"at most {room} bytes long, for Ray's sockets lie below it",
        "Set TMPDIR to a shorter path, such as /tmp.",
    )


def _ports(ports: Mapping[str, int]) -> Iterator[Check]:
    for setting, port in ports.items():
        if port:
            yield Check(
                setting,
                port_is_free(port),
                str(port),
                "a port that nobody listens on",
                f"Choose another with --set {setting}=PORT, or 0 where the recipe allows it.",
            )


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    return Check(
        "cores",
        cores >= MIN_CORES,
        str(cores),
        f"at least {MIN_CORES}, else engine and trainer share one",
        "Expect a slow run.",
        required=False,
    )


def _open_files() -> Check:
    _, limit = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
    unlimited = limit == psutil.RLIM_INFINITY
    return Check(
        "open files",
        unlimited or limit >= MIN_OPEN_FILES,
        "unlimited" if unlimited else str(limit),
        f"a hard limit of at least {MIN_OPEN_FILES}",
        "Raise nofile in /etc/security/limits.conf.",
        required=False,
    )
