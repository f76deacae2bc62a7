"""What code in the sandbox can do, and cannot; where namespaces are denied, tests of them skip and say so."""

import asyncio
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from miles_core.errors import InputError
from miles_rollout.sandbox import Limits, LocalSandbox, Result, SandboxUnavailable, choose, choose_sandbox, local


@functools.cache
def denied() -> str:
    try:
        asyncio.run(LocalSandbox().run({}, ["true"], "", Limits(timeout_s=30)))
    except SandboxUnavailable as error:
        return str(error)
    return ""


@pytest.fixture(params=["namespaces", "none"])
def sandbox(request: pytest.FixtureRequest) -> LocalSandbox:
    """Both ways, for what must hold in both."""
    if request.param == "namespaces" and denied():
        pytest.skip(denied())
    return LocalSandbox(isolate=request.param == "namespaces")


@pytest.fixture
def isolated() -> LocalSandbox:
    if denied():
        pytest.skip(denied())
    return LocalSandbox()


def python(sandbox: LocalSandbox, code: str, stdin: str | bytes = "", **limits: float) -> Result:
    allowed = Limits(**{"timeout_s": 20.0, **limits})  # type: ignore[arg-type]
    return asyncio.run(sandbox.run({"main.py": code}, ["python3", "-I", "main.py"], stdin, allowed))


def test_a_program_reads_and_writes_and_ends(sandbox: LocalSandbox) -> None:
    result = python(
        sandbox, "import sys; print(sum(map(int, input().split()))); print('e', file=sys.stderr); exit(3)", "1 2"
    )
    assert (result.ended, result.exit_code, result.stdout, result.stderr) == ("exit", 3, b"3\n", b"e\n")
    assert not result.ok and python(sandbox, "").ok


def test_much_goes_in_and_much_comes_out(sandbox: LocalSandbox) -> None:
    data = bytes(range(256)) * 4000
    result = python(sandbox, "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", data, output_bytes=1 << 21)
    assert result.ok and result.stdout == data


def test_files_lie_in_the_folder_by_their_names(sandbox: LocalSandbox) -> None:
    code = "from package.deep import two\nopen('new', 'w').write('x')\nprint(two.x, open('data.bin', 'rb').read())"
    files: Mapping[str, str | bytes] = {"main.py": code, "package/deep/two.py": "x = 2", "data.bin": b"\0\xff"}
    result = asyncio.run(sandbox.run(files, ["python3", "main.py"], "", Limits(timeout_s=20)))
    assert result.stdout == b"2 b'\\x00\\xff'\n", result.stderr


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", ""])
def test_names_that_lead_out_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="relative name"):
        asyncio.run(LocalSandbox().run({name: ""}, ["true"], "", Limits()))


HANG = "while True: pass"
ALLOCATE = "kept = []\nwhile True: kept.append(bytearray(1 << 22))"
ALLOCATE_TOGETHER = (
    "import os, time\nfor _ in range(8):\n  if os.fork() == 0:\n    kept = bytearray(b'x') * (64 << 20)\n"
    "    time.sleep(1000)\ntime.sleep(1000)"
)
PRINT = "while True: print('x' * (1 << 20))"
LEAVE = "import os, subprocess\nsubprocess.Popen(['sleep', '1001'], start_new_session=True, env={})\n"


@pytest.mark.parametrize(
    ("code", "limits", "ended"),
    [
        (HANG, {"timeout_s": 0.5}, "timeout"),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + HANG, {"timeout_s": 0.5}, "timeout"),
        (PRINT, {}, "output"),
        (ALLOCATE, {"memory_bytes": 128 << 20}, "exit"),
        (ALLOCATE_TOGETHER, {"memory_bytes": 256 << 20}, "memory"),
        (LEAVE, {}, "exit"),
        (LEAVE + HANG, {"timeout_s": 0.5}, "timeout"),
        ("import os\nos.kill(os.getpid(), 11)", {}, "exit"),
    ],
)
def test_limits_end_it_and_nothing_stays(
    sandbox: LocalSandbox, code: str, limits: dict[str, float], ended: str
) -> None:
    before = set(psutil.pids())
    result = python(sandbox, code, **limits)
    assert result.ended == ended, result
    assert result.ok == (code == LEAVE)
    assert len(result.stdout) <= Limits().output_bytes
    new = [psutil.Process(pid) for pid in psutil.pids() if pid not in before and is_from_here(pid)]
    assert not psutil.wait_procs(new, timeout=3)[1]


def is_from_here(pid: int) -> bool:
    try:
        line = psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return False
    return line[:2] == ["sleep", "1001"] or "main.py" in line


def test_forks_without_end_are_counted(isolated: LocalSandbox) -> None:
    result = python(isolated, "import os\nwhile True: os.fork()", processes=16)
    assert result.ended in ("exit", "processes") and not result.ok


def test_forks_without_end_are_counted_outside_of_namespaces_too() -> None:
    code = "import os, time\nfor _ in range(40):\n  if os.fork() == 0: time.sleep(1000)\ntime.sleep(1000)"
    assert python(LocalSandbox(isolate=False), code, processes=16).ended == "processes"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 22), 2)", "OSError"),
        ("import socket; socket.create_connection(('8.8.8.8', 53), 2)", "OSError"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("open('/etc/shadow')", "No such file"),
        ("import os; os.listdir('/home')", "No such file"),
        ("import os; os.listdir('/sys')", "No such file"),
        ("import os; os.setuid(0)", "Operation not permitted"),
        ("import os; os.unshare(os.CLONE_NEWUSER)", "Operation not permitted"),
        ("import os; os.chroot('/tmp')", "Operation not permitted"),
        ("open('/proc/1/mem')", "Permission denied"),
        ("while True: open('f', 'ab').write(bytes(1 << 20))", "No space left"),
        ("open('big', 'wb').truncate(1 << 40)", "File too large"),
    ],
)
def test_doors_are_shut(isolated: LocalSandbox, code: str, error: str) -> None:
    result = python(isolated, code)
    assert not result.ok and error in result.stderr.decode() + "OSError" * ("socket" in code)


def test_nothing_of_the_host_shows(isolated: LocalSandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    (tmp_path / "secret").write_text("hunter2")
    code = (
        "import os\n"
        "print(sorted(os.environ))\n"
        "print([name for name in os.listdir('/proc') if name.isdigit() and int(name) > 20])\n"
        f"print(os.path.exists({str(tmp_path / 'secret')!r}), os.path.exists({str(Path(__file__))!r}))\n"
        "print([fd for fd in os.listdir('/proc/self/fd') if int(fd) > 3], os.uname().nodename, os.getuid())\n"
        "print(set(open('/proc/self/status').read().split('Cap')[1:][-1].split()))\n"
    )
    result = python(isolated, code)
    environment, processes, files, fds, _ = result.stdout.decode().splitlines()
    assert "SECRET" not in environment and "HOME" in environment, result.stderr
    assert (processes, files, fds) == ("[]", "False False", "[] sandbox 65534")


def test_threads_and_process_pools_work(isolated: LocalSandbox) -> None:
    code = (
        "import multiprocessing, threading\n"
        "if __name__ == '__main__':\n"
        "    thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "    with multiprocessing.Pool(2) as pool: print(pool.map(abs, [-1, 2]))\n"
    )
    assert python(isolated, code).stdout == b"thread\n[1, 2]\n"


def test_as_many_as_are_asked_for_run_at_once(isolated: LocalSandbox) -> None:
    async def run() -> Sequence[Result]:
        box = LocalSandbox(at_once=2)
        return await asyncio.gather(*[box.run({}, ["echo", str(n)], "", Limits(timeout_s=30)) for n in range(6)])

    assert [result.stdout for result in asyncio.run(run())] == [f"{n}\n".encode() for n in range(6)]


def test_a_command_that_is_not_there(sandbox: LocalSandbox) -> None:
    result = asyncio.run(sandbox.run({}, ["no-such-command"], "", Limits(timeout_s=20)))
    assert (result.exit_code, result.stderr) == (127, b"no-such-command: No such file or directory\n")


LAUNCHER_THAT_IS_DENIED = """
import json, os, sys
setup = json.load(open(int(sys.argv[1]), closefd=False))
if setup["isolate"]:
    os.write(int(sys.argv[2]), json.dumps({"error": "[Errno 1] Operation not permitted"}).encode())
else:
    sys.argv[0] = %r
    os.lseek(int(sys.argv[1]), 0, 0)
    exec(compile(open(sys.argv[0]).read(), "launcher", "exec"))
"""


def test_a_denied_sandbox_is_refused_unless_the_recipe_allows_to_do_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER_THAT_IS_DENIED % str(local._LAUNCHER))
    monkeypatch.setattr(local, "_LAUNCHER", launcher)
    monkeypatch.setattr(choose, "_tried", set())
    with pytest.raises(SandboxUnavailable, match=r"Operation not permitted.*allow_untrusted_exec"):
        asyncio.run(choose_sandbox())
    allowed = asyncio.run(choose_sandbox(allow_untrusted_exec=True))
    assert isinstance(allowed, LocalSandbox)
    assert asyncio.run(allowed.run({}, ["echo", "1"], "", Limits(timeout_s=20))).stdout == b"1\n"


class Elsewhere:
    async def run(
        self, files: Mapping[str, str | bytes], command: Sequence[str], stdin: str | bytes, limits: Limits
    ) -> Result:
        return Result("exit", 0, b"elsewhere", b"", 0.0)


def test_a_sandbox_of_ones_own_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rollout_sandbox_elsewhere", sys.modules[__name__])
    box = asyncio.run(choose_sandbox("rollout_sandbox_elsewhere:Elsewhere"))
    assert asyncio.run(box.run({}, ["x"], "", Limits())).stdout == b"elsewhere"
    with pytest.raises(InputError, match="must be a Sandbox"):
        asyncio.run(choose_sandbox("rollout_sandbox_elsewhere:denied"))
