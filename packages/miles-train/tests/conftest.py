"""Trainer ranks for tests: a trainer owns its process, so they run in processes of their own, started once."""

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 120
HERE = Path(__file__).parent
# The helpers beside the tests, importable by name as they are in the ranks.
sys.path.insert(0, str(HERE))


class Ranks:
    """Up to four rank processes, forked when first needed from one that has made their imports."""

    def __init__(self):
        self._parent = None
        self._ranks = []

    def run(self, function, *args, world_size=1):
        """Call `function(address, *args)` in `world_size` processes; the return value of each rank.

        Args:
            function: "module.function" of a module in this folder.
            args: picklable.
            world_size: ranks; `address` is a tuple of rank, world_size, host and an iterator over free ports: ranks
                that meet again need another one, the old one may not be closed yet.
        """
        self._parent = self._parent or _Parent()
        while len(self._ranks) < world_size:
            self._ranks.append(self._parent.fork())
        ranks, ports = self._ranks[:world_size], _free_ports(8)
        for number, rank in enumerate(ranks):
            rank.send((function, ((number, world_size, "127.0.0.1", iter(ports)), *args)))
        return self._collect(ranks)

    def _collect(self, ranks):
        waiting = {rank.connection: number for number, rank in enumerate(ranks)}
        answers = {}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], DEADLINE_S)
            kind, value = ("raised", f"no answer in {DEADLINE_S} s from ranks {sorted(waiting.values())}")
            if ready:
                kind, value = ranks[waiting[ready[0]]].receive()
            if kind == "raised":
                if len(ranks) > 1 or not ready:
                    self._kill()  # the others may wait for the one that raised
                raise AssertionError(value)
            answers[waiting.pop(ready[0])] = value
        return [answers[number] for number in range(len(ranks))]

    def run_one(self, function, *args):
        """Call `function(address, *args)` in one process; its return value."""
        return self.run(function, *args)[0]

    def _kill(self):
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.kill()

    def close(self):
        """End all processes."""
        self._kill()
        if self._parent:
            self._parent.close()


class _Parent:
    """The process that ranks are forked from."""

    def __init__(self):
        # No compiler: nothing that a trainer does on a CPU may want one.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CC": "/bin/false", "CXX": "/bin/false", "HF_HUB_OFFLINE": "1"}
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-W", "error::ResourceWarning", str(HERE / "rank_process.py"), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env)

    def fork(self):
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        pid = int.from_bytes(self._control.recv(8), "little")
        assert pid, "the ranks' imports failed: its error says why"
        return _Rank(pid, ours)

    def close(self):
        self._control.close()
        self._process.wait()


class _Rank:
    """One of its children."""

    def __init__(self, pid, connection):
        self._pid, self.connection = pid, connection
        self._answers = connection.makefile("rb")

    def send(self, request):
        self.connection.sendall(pickle.dumps(request))

    def receive(self):
        try:
            return pickle.load(self._answers)
        except (EOFError, ConnectionResetError):
            return "raised", f"rank process {self._pid} died"

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)  # they hold nothing: leaving in order takes seconds
        self._answers.close()
        self.connection.close()


def _free_ports(count):
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()
