"""An engine in a process of its own, which ends when this one does."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import torch

from miles_sync.bench.engine import FusedReceiver
from miles_sync.errors import DeadlineError, PeerLostError
from miles_sync.manifest import TensorMeta
from miles_sync.server import serve

READY_S = 120.0
_TOKEN = "MILES_SYNC_BENCH_TOKEN"
_SAMPLE_S = 0.01


class Engine:
    """A running engine, as its parent sees it.

    Attributes:
        port: Where it receives, on loopback.
        pid: Its process.
    """

    def __init__(self, child: subprocess.Popen[str], port: int) -> None:
        """Use `engine`."""
        self.port = port
        self.pid = child.pid
        self._child = child

    def memory(self) -> dict[str, int]:
        """Bytes that it held when it was ready, and at most since then: of its GPU, or of the host."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write("memory\n")
        self._child.stdin.flush()
        return msgspec.json.decode(self._child.stdout.readline(), type=dict[str, int])


@contextlib.contextmanager
def engine(metas: Sequence[TensorMeta], device: torch.device, token: str) -> Iterator[Engine]:
    """Start one that holds such tensors. Raises `DeadlineError`, `PeerLostError` where it does not come up."""
    command = [sys.executable, "-m", "miles_sync", "engine", "--device", str(device)]
    environment = {**os.environ, _TOKEN: token, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    timer = threading.Timer(READY_S, child.kill)
    timer.start()
    try:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.json.encode(list(metas)).decode() + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line.startswith("port "):
            late = not timer.is_alive()
            reason = f"the engine's process did not start: {line!r}, exit {child.poll()}"
            raise (DeadlineError if late else PeerLostError)(reason, stage="connect")
        timer.cancel()
        yield Engine(child, int(line.split()[1]))
    except BrokenPipeError as error:
        raise PeerLostError("the engine's process ended while it started", stage="connect") from error
    finally:
        timer.cancel()
        child.kill()
        child.wait(20)
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def run_engine(device: torch.device) -> None:
    """Be that process: the tensors come on standard input, then requests; the end of the input is the end."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    metas = msgspec.json.decode(sys.stdin.readline(), type=list[TensorMeta])
    receiver = FusedReceiver(metas, device)
    with serve(receiver, token=os.environ[_TOKEN]) as server:
        memory = _Memory(device)
        _answer(f"port {server.port}")
        for line in sys.stdin:
            if line == "memory\n":
                _answer(msgspec.json.encode(memory.report()).decode())


class _Memory:
    """Watches what this process' GPU holds; of the host the kernel knows the peak."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._peak = self._now()
        if device.type == "cuda":
            threading.Thread(target=self._watch, daemon=True).start()

    def report(self) -> dict[str, int]:
        self._peak = max(self._peak, self._now())
        return {
            "before_bytes": self._before,
            "peak_bytes": self._peak,
            "extra_bytes": self._peak - self._before,
        }

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._now())
            time.sleep(_SAMPLE_S)

    def _now(self) -> int:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _answer(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
