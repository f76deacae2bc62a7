"""Ranks for a tool that answers and is done: plain processes on loopback, not Ray's actors.

A run needs Ray: placement, supervision, a dashboard. A tool of a minute does not, and starting a cluster would take
longer than its work on a tiny model. What a run has is kept: a rank that dies ends all, nobody is left behind. Each
process holds the reading end of a pipe from the tool and ends itself when that closes, which it does however the tool
ends; Ctrl-C reaches the tool alone, since each rank has a session of its own.

A rank is asked to call `function(Address, **request)` and its answer, plain data, comes back by file.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from miles_core import InputError, MilesError
from miles_core.errors import RoleDied
from miles_core.ports import free_port

_POLL_S = 0.05
_TAIL_LINES = 12


class RankFailed(MilesError):
    """A rank ended with an error of ours; the exit code is that error's."""

    def __init__(self, message: str, exit_code: int):
        """Take over what the rank said."""
        super().__init__(message)
        self.exit_code = exit_code


def run_ranks(function: str, request: Mapping[str, Any], num_ranks: int, folder: Path) -> Any:
    """Call a function in so many new processes, and wait.

    Args:
        function: "package.module:name" of what each rank calls as `function(address, **request)`.
        request: JSON-able arguments.
        num_ranks: processes.
        folder: for their logs and answers; new for each call.

    Returns:
        What the first rank returned; it must be JSON-able.

    Raises:
        InputError: as a rank raised it.
        RankFailed: a rank raised another error of ours.
        RoleDied: a rank died; the end of its log is in the message.
    """
    folder.mkdir()
    (folder / "request.json").write_text(json.dumps({"function": function, "request": request}), encoding="utf-8")
    port = free_port()
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with ExitStack() as stack:
        processes = []
        for rank in range(num_ranks):
            log = stack.enter_context((folder / f"rank-{rank}.log").open("wb"))
            command = [sys.executable, "-m", __name__, str(folder), str(rank), str(num_ranks), str(port)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
            processes.append(process)
            stack.callback(_end, process)
        _wait(processes, folder)
    return json.loads((folder / "answer.json").read_text(encoding="utf-8"))


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all are done, or one failed."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            raise _error(failed, codes, folder)
        if None not in codes:
            return
        time.sleep(_POLL_S)


def _error(failed: list[int], codes: list[int | None], folder: Path) -> MilesError:
    """What the first failed rank said; one that said something before one that merely lost the others."""
    told = [path for rank in failed if (path := folder / f"error-{rank}.json").is_file()]
    if told:
        error = json.loads(min(told, key=lambda path: path.stat().st_mtime_ns).read_text(encoding="utf-8"))
        if "setting" in error:
            return InputError(error["setting"], _Shown(error["value"]), error["rule"], error["way_out"])
        return RankFailed(error["message"], error["exit_code"])
    rank = failed[0]
    lines = (folder / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    how = f"by signal {-code}" if (code := codes[rank] or 0) < 0 else f"with exit code {code}"
    hint = " (9 may mean that the machine ran out of memory)" if code == -9 else ""
    return RoleDied(f"rank {rank} of {len(codes)} ended {how}{hint}; its last words:\n" + "\n".join(lines))


class _Shown(str):
    """A value that was shown once already, in a rank."""

    def __repr__(self) -> str:
        return str(self)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _end_with_the_tool() -> None:
    """End this process when the pipe from the tool closes."""
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock would be held when the interpreter ends
    os._exit(1)


def main() -> None:
    """Be a rank."""
    threading.Thread(target=_end_with_the_tool, daemon=True).start()
    folder, rank, num_ranks, port = Path(sys.argv[1]), *map(int, sys.argv[2:])
    sys.path.insert(0, str(Path.cwd()))  # as the command does for its user's modules
    asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    from miles_train.megatron.runtime import Address  # noqa: PLC0415 (Megatron, which the tool itself does not load)

    module, _, name = asked["function"].partition(":")
    try:
        answer = getattr(importlib.import_module(module), name)(
            Address(rank, num_ranks, master_port=port), **asked["request"]
        )
    except MilesError as error:
        traceback.print_exc()
        (folder / f"error-{rank}.json").write_text(json.dumps(_told(error)), encoding="utf-8")
        os._exit(error.exit_code)  # other ranks may wait for this one in a collective: nothing here waits for them
    if rank == 0:
        (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _told(error: MilesError) -> dict[str, Any]:
    if isinstance(error, InputError):
        fields = ("setting", "rule", "way_out")
        return {"value": repr(error.value), **{field: getattr(error, field) for field in fields}}
    return {"message": str(error), "exit_code": error.exit_code}


if __name__ == "__main__":
    main()
