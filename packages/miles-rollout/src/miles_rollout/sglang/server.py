"""One SGLang server in a child process that cannot outlive its owner.

    owner ── thread "engine-0" ── python -m miles_rollout.sglang._entry ─┬─ sglang::scheduler (one per rank)
                                        (HTTP, tokens in and out)        └─ sglang::detokenizer

    new ──launch──▶ starting ──ready──▶ serving ──stop──▶ ended
                       └──────failed / died / stop──────────▲

Whoever dies takes those below along: each process asks the kernel for a signal at its parent's end, and the main one
also watches its stdin and its parent's pid. The kernel ties that signal to the THREAD that started the process, so a
thread of its own starts it, waits for it and ends with it.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from miles_core.errors import DeadlineExceeded, InputError
from miles_core.ports import free_port, port_is_free
from miles_rollout.errors import EngineDied, EngineStartError
from miles_rollout.sglang import cpu
from miles_rollout.sglang.arguments import check_arguments, complete_arguments
from miles_rollout.sglang.client import EngineAddress

_LOG_TAIL_LINES = 25
# The last line of a traceback.
_RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt): ")
# Seconds that killed processes may take to be gone.
_STOP_GRACE_S = 5.0
_LISTEN_DEADLINE_S = 30.0
# Temporary folders: the prefix, then the owner's pid. The file in it lists what is in shared memory.
_TEMPORARY = "miles-sglang-"
_SHARED_MEMORY = "shared_memory.txt"


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What to serve and how.

    Attributes:
        model_path: a Hugging Face directory.
        arguments: SGLang's own names, verbatim; `device="cpu"` brings the CPU shim.
        log_path: file that receives what the engine prints; its folder is made.
        name: for messages, e.g. "engine-0".
        deterministic: the same prompt, weights and seed give the same response, whatever else is served.
        seed: of sampling without per-request seeds.
        custom_weight_loaders: dotted paths that /update_weights_from_tensor may name as load_format.
        start_deadline_s: seconds from `launch` to ready.
    """

    model_path: str
    log_path: Path
    arguments: Mapping[str, Any] = field(default_factory=dict)
    name: str = "engine-0"
    deterministic: bool = False
    seed: int = 0
    custom_weight_loaders: tuple[str, ...] = ()
    start_deadline_s: float = 300.0


class SGLangServer:
    """A stock SGLang server. Plain and blocking; belongs to one owner process (a Ray actor, a test)."""

    def __init__(self, settings: ServerSettings):
        """Check the settings; nothing is started.

        Raises:
            InputError: an argument that SGLang does not have or that Miles decides, a port that is taken, or a model
                directory that is not there.
        """
        check_arguments(settings.arguments)
        if not Path(settings.model_path, "config.json").is_file():
            raise InputError(
                "model.path", settings.model_path, "must be a Hugging Face directory (config.json)", "Check the path."
            )
        self._settings = settings
        arguments = complete_arguments(settings.arguments, settings.deterministic)
        self._is_cpu = arguments.get("device") == "cpu"
        if self._is_cpu:
            cpu.check_version()
        host = arguments["host"]
        port = arguments.setdefault("port", None)
        if port is None:
            arguments["port"] = free_port(host)
        elif not port_is_free(port, host):
            raise InputError(
                "rollout.sglang.port", port, f"is taken on {host}", "Leave it out, and a free one is chosen."
            )
        arguments.setdefault("random_seed", settings.seed)
        if settings.custom_weight_loaders:
            arguments["custom_weight_loader"] = list(settings.custom_weight_loaders)
        self._arguments = arguments
        self._keys = {name: secrets.token_urlsafe(32) for name in ("api_key", "admin_api_key")}
        self._temporary = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._launched = threading.Event()
        self._settled = threading.Event()  # ready, failed or ended
        self._stopping = False
        self._events: list[dict[str, Any]] = []
        self._since = 0.0
        self._log_start = 0

    @property
    def address(self) -> EngineAddress:
        """Where a client finds the engine, with its keys."""
        host = self._arguments["host"]
        host = "127.0.0.1" if host == "0.0.0.0" else host
        return EngineAddress(f"http://{host}:{self._arguments['port']}", **self._keys, name=self._settings.name)

    @property
    def processes(self) -> Mapping[int, str]:
        """Pids and names of the engine's processes, once it is ready."""
        ready = next((event for event in self._events if event["event"] == "ready"), None)
        if ready is None or self._process is None:
            return {}
        return {self._process.pid: "sglang::server"} | {int(p): name for p, name in ready["children"].items()}

    def start(self) -> EngineAddress:
        """`launch` and `wait_ready`."""
        self.launch()
        return self.wait_ready()

    def launch(self) -> None:
        """Start the process and return at once."""
        if self._process is not None:
            raise RuntimeError(f"{self._settings.name} was launched before: make a new SGLangServer")
        self._since = time.monotonic()
        thread = threading.Thread(target=self._supervise, name=self._settings.name, daemon=True)
        thread.start()
        self._launched.wait()

    def wait_ready(self) -> EngineAddress:
        """Wait until the engine serves.

        Raises:
            EngineStartError: it ended instead; the message has the end of its log.
            DeadlineExceeded: it did neither in time, and was stopped.
        """
        left = self._settings.start_deadline_s - (time.monotonic() - self._since)
        if not self._settled.wait(max(left, 0)):
            self.stop()
            raise DeadlineExceeded(
                f"{self._settings.name} (SGLang) was not ready {self._settings.start_deadline_s:g} s after its launch "
                f"(cluster.start_deadline_s) and was stopped.\n{self._log_tail()}"
            )
        if not self.processes:
            raise EngineStartError(self._why_not_started())
        self._wait_listening()
        return self.address

    def _wait_listening(self) -> None:
        """SGLang says that it is ready a moment before its HTTP server listens."""
        where = (self._arguments["host"], self._arguments["port"])
        deadline = time.monotonic() + _LISTEN_DEADLINE_S
        while True:
            try:
                socket.create_connection(where, timeout=1).close()
            except OSError:
                self.check()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def check(self) -> None:
        """Raise EngineDied, naming the process, if the engine is no longer complete."""
        died = next((event for event in self._events if event["event"] == "died"), None)
        if died is not None:
            how = f"{died['process']} of {self._settings.name} {_exit_words(died['exit'])}"
        elif self._process is None or self._process.returncode is not None:
            code = None if self._process is None else self._process.returncode
            how = f"{self._settings.name} (SGLang) {_exit_words(code)}"
        else:
            return
        raise EngineDied(f"{how}.\n{self._log_tail()}")

    def stop(self) -> None:
        """End all processes of the engine and remove its temporary files. Safe to call twice."""
        self._stopping = True
        process = self._process
        if process is not None:
            _kill_tree(process)
        if self._temporary:
            _remove(Path(self._temporary))
        self._settled.set()

    def _supervise(self) -> None:
        """Start the process, listen to what becomes of it, and stay until it ends (see the module's docstring)."""
        status_in, status_out = os.pipe()
        try:
            self._process = self._spawn(status_out)
        except (OSError, TypeError, ValueError) as error:  # no program, no memory, or a value that is no JSON
            self._events.append({"event": "failed", "error": f"{type(error).__name__}: {error}"})
            self._settled.set()
            os.close(status_in)
            return
        finally:
            os.close(status_out)
            self._launched.set()
        with os.fdopen(status_in) as events:
            for line in events:
                event = json.loads(line)
                self._events.append(event)
                if event["event"] == "ready":
                    self._settled.set()
                elif event["event"] == "named":
                    with Path(self._temporary, _SHARED_MEMORY).open("a") as names:
                        names.write(event["shared_memory"] + "\n")
        self._process.wait()
        # What the kernel has not ended yet, and what would be left on disk.
        self.stop()

    def _spawn(self, status_out: int) -> subprocess.Popen[bytes]:
        settings = self._settings
        settings.log_path.parent.mkdir(parents=True, exist_ok=True)
        # SGLang's sockets and their files, which it leaves behind, in a folder that nobody else can enter.
        _remove_leftovers()
        self._temporary = tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-")
        environment = dict(os.environ)
        if self._is_cpu:
            environment = cpu.environment(environment, _architectures(settings.model_path))
        # Plugins of other packages do not run in our engines.
        environment |= {"TMPDIR": self._temporary, "SGLANG_PLUGINS": "miles"}
        task = {
            "arguments": {"model_path": settings.model_path, **self._arguments},
            "cpu": self._is_cpu,
            "deterministic": settings.deterministic,
            **self._keys,
        }
        order = json.dumps(task).encode() + b"\n"
        with settings.log_path.open("ab") as log:
            self._log_start = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "miles_rollout.sglang._entry", str(os.getpid()), str(status_out)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[status_out],
                start_new_session=True,  # Ctrl-C in the terminal is for the owner
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already, which the log explains
            process.stdin.write(order)
            process.stdin.flush()
        return process

    def _why_not_started(self) -> str:
        settings = self._settings
        failed = next((event["error"] for event in self._events if event["event"] == "failed"), None)
        # A scheduler that fails has the main process killed: what it raised is in the log alone.
        raised = [line for line in self._log_lines() if _RAISED.match(line)]
        code = None if self._process is None else self._process.returncode
        cause = failed or (raised[-1] if raised else f"its process {_exit_words(code)}")
        return (
            f"{settings.name} (SGLang) could not start: {cause[:1000]}. It was given model.path = "
            f"{settings.model_path!r} and rollout.sglang = {dict(settings.arguments)!r}.\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        tail = "\n".join(f"  | {line[:300]}" for line in self._log_lines()[-_LOG_TAIL_LINES:])
        return f"The end of its log {self._settings.log_path}:\n{tail}"

    def _log_lines(self) -> list[str]:
        """What this engine wrote last; the file may hold the logs of earlier ones before it."""
        try:
            with self._settings.log_path.open("rb") as log:
                log.seek(max(self._log_start, self._settings.log_path.stat().st_size - 64_000))
                return log.read().decode(errors="replace").splitlines()
        except OSError as error:
            return [f"(cannot be read: {error.strerror})"]


def _architectures(model_path: str) -> list[str]:
    return json.loads(Path(model_path, "config.json").read_text()).get("architectures") or []


def _exit_words(code: int | None) -> str:
    if code is None:
        return "is gone"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all its descendants and wait for their end."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        main = psutil.Process(process.pid)
        tree = [*main.children(recursive=True), main]
    # The main process first: its children are told by the kernel, and nobody starts another.
    for member in reversed(tree):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(tree[:-1], timeout=_STOP_GRACE_S)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_GRACE_S)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _remove(folder: Path) -> None:
    """Remove an engine's temporary folder, and the shared memory that is written down in it."""
    with contextlib.suppress(OSError):
        for pattern in (folder / _SHARED_MEMORY).read_text().splitlines():
            for path in Path("/").glob(pattern.removeprefix("/")):
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Clean up after engines whose owner was killed and could not."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*-*"):
        owner = folder.name.removeprefix(_TEMPORARY).partition("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdigit() and folder.stat().st_uid == os.getuid() and not psutil.pid_exists(int(owner)):
                _remove(folder)
