"""The engine's main process: `python -m miles_rollout.sglang._entry PARENT_PID STATUS_FD`.

What it is to run comes as one line of JSON on stdin, so that keys show neither in `ps` nor in the environment:

    {"arguments": {...}, "api_key": ..., "admin_api_key": ..., "cpu": bool, "deterministic": bool}

What becomes of it goes to STATUS_FD, one JSON object a line:

    {"event": "named", "shared_memory": "/dev/shm/sglang_loads_0a1b2c_*"}      what it would leave behind
    {"event": "ready", "children": {"1234": "sglang::scheduler", ...}}
    {"event": "failed", "error": "..."}        it could not start
    {"event": "died", "process": "sglang::scheduler", "exit": -9}

stdin stays open while the owner lives; its end is the owner's end.
"""

import os
import sys

from miles_rollout.sglang._process import Secret, die_with

if __name__ == "__mp_main__":  # a spawned child imports this first: before SGLang's imports, which take seconds
    die_with(int(os.environ["MILES_SGLANG_MAIN_PID"]))

import json
import multiprocessing
import threading
import time
import traceback
from multiprocessing.connection import wait
from typing import Any, NoReturn

from miles_rollout.sglang import cpu


def main() -> None:
    """Serve until killed."""
    owner_pid, status_fd = int(sys.argv[1]), int(sys.argv[2])
    die_with(owner_pid)
    os.environ["MILES_SGLANG_MAIN_PID"] = str(os.getpid())
    task = json.loads(sys.stdin.readline())

    def report(**event: Any) -> None:
        os.write(status_fd, json.dumps(event).encode() + b"\n")

    try:
        _serve(task, owner_pid, report)
    except BaseException as error:  # noqa: BLE001  the owner must hear of every end
        traceback.print_exc()
        report(event="failed", error=f"{type(error).__name__}: {error}")
        sys.stderr.flush()
        _end()


def _serve(task: dict[str, Any], owner_pid: int, report: Any) -> None:
    if task["cpu"]:
        cpu.leave_out_unused()
    # Order matters: the shim's hooks must be registered before the modules that they hook are used.
    from sglang.srt.entrypoints.http_server import launch_server  # noqa: PLC0415  after die_with
    from sglang.srt.plugins import load_plugins  # noqa: PLC0415
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415
    from sglang.srt.server_args import ServerArgs  # noqa: PLC0415

    if task["cpu"]:
        cpu.install(task["deterministic"])

    def named(port_args: Any, *_: Any, **__: Any) -> None:
        report(event="named", shared_memory=f"/dev/shm/sglang_loads_{port_args.instance_id}_*")

    HookRegistry.register("sglang.srt.server_args.PortArgs.init_new", named, HookType.AFTER)
    load_plugins()
    arguments: dict[str, Any] = dict(task["arguments"])
    arguments.update((name, Secret(task[name])) for name in ("api_key", "admin_api_key"))
    server_args = ServerArgs(**arguments)

    def ready() -> None:
        names = {child: _title(child.pid) for child in multiprocessing.active_children()}
        threading.Thread(target=_watch_owner, args=(owner_pid,), daemon=True).start()
        threading.Thread(target=_watch_children, args=(names, report), daemon=True).start()
        report(event="ready", children={str(child.pid): name for child, name in names.items()})

    launch_server(server_args, launch_callback=ready)


def _title(pid: int | None) -> str:
    """What SGLang's processes call themselves: sglang::scheduler, sglang::scheduler_TP1, sglang::detokenizer."""
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().strip("\0").strip()


def _watch_owner(owner_pid: int) -> None:
    """End when the owner ends: the parent-death signal again, by other means."""
    threading.Thread(target=lambda: (sys.stdin.read(), _end()), daemon=True).start()
    while os.getppid() == owner_pid:
        time.sleep(0.5)
    _end()


def _watch_children(names: dict[Any, str], report: Any) -> None:
    """Say which process died, before SGLang's own watchdog ends this one."""
    gone = wait([child.sentinel for child in names])
    for child, name in names.items():
        if child.sentinel in gone:
            child.join(1.0)  # its pipe closes a moment before its exit code is there
            report(event="died", process=name, exit=child.exitcode)
    _end()


def _end() -> NoReturn:
    """Leave at once; children follow by their parent-death signal."""
    os._exit(1)


if __name__ == "__main__":
    main()
