"""Trainer ranks for tests: a trainer owns its process, so they run in processes of their own, started once."""

import contextlib
import os
import pickle
import select
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
    """Up to four rank processes, started when first needed."""

    def __init__(self):
        self._processes = []

    def run(self, function, *args, world_size=1):
        """Call `function(address, *args)` in `world_size` processes; the return value of each rank.

        Args:
            function: "module.function" of a module in this folder.
            args: picklable.
            world_size: ranks; `address` is a tuple of rank, world_size, host and an iterator over free ports: ranks
                that meet again need another one, the old one may not be closed yet.
        """
        while len(self._processes) < world_size:
            self._processes.append(_start())
        processes, ports = self._processes[:world_size], _free_ports(8)
        for rank, process in enumerate(processes):
            pickle.dump((function, ((rank, world_size, "127.0.0.1", iter(ports)), *args)), process.stdin)
            process.stdin.flush()
        return self._collect(processes)

    def _collect(self, processes):
        waiting = {process.stdout: rank for rank, process in enumerate(processes)}
        answers = {}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], DEADLINE_S)
            kind, value = ("raised", f"no answer in {DEADLINE_S} s from ranks {sorted(waiting.values())}")
            if ready:
                kind, value = pickle.load(ready[0])
            if kind == "raised":
                if len(processes) > 1 or not ready:
                    self.close()  # the others may wait for the one that raised
                raise AssertionError(value)
            answers[waiting.pop(ready[0])] = value
        return [answers[rank] for rank in range(len(processes))]

    def run_one(self, function, *args):
        """Call `function(address, *args)` in one process; its return value."""
        return self.run(function, *args)[0]

    def close(self):
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()  # they hold nothing: leaving in order takes seconds
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()


def _start():
    # No compiler: nothing that a trainer does on a CPU may want one.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CC": "/bin/false", "CXX": "/bin/false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::ResourceWarning", str(HERE / "rank_process.py")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


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
