"""Runs one command inside namespaces of its own: `python -I -S _launcher.py SETUP_FD REPORT_FD`.

    launcher            in the owner's namespaces; dies with the owner
      └ go-between      new user, mount, pid, network, ipc, uts and cgroup namespaces; ids mapped by the launcher
          └ init        pid 1: builds the root, waits for the command; its end is everybody's end
              └ command no rights, limits, a filter of system calls

Run as a file, not as a module: it starts in milliseconds and needs the standard library alone. What the calls and
constants mean is in mount(2), mount_setattr(2), pivot_root(2), user_namespaces(7) and prctl(2).
"""

import base64
import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
from typing import Any, NoReturn

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_SYS_MOUNT_SETATTR = 442
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 22, 24, 38
_SECCOMP_MODE_FILTER = 2

_NOBODY = 65534
_ROOT = "/tmp"  # where the new root is built: a folder that every host has
_WORK = "/tmp/work"  # of the command, in the new root
_DEVICES = ("null", "zero", "full", "random", "urandom")
_ETC = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read the setup, run the command, leave {"exit": code} or {"error": text} at the report's end of the pipe."""
    setup_fd, report_fd = map(int, sys.argv[1:])
    with open(setup_fd, "rb") as file:
        setup = json.load(file)
    os.set_inheritable(report_fd, False)
    _die_with(setup["owner_pid"])
    with _reported(report_fd):
        if setup["isolate"]:
            _isolate(setup, report_fd)
        else:
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            _serve(setup, report_fd, os.getuid())


@contextlib.contextmanager
def _reported(report_fd: int) -> Any:
    """What fails here ends this process with its words in the report."""
    try:
        yield
    except OSError as error:
        os.write(report_fd, json.dumps({"error": str(error)}).encode() + b"\n")
        os._exit(1)


def _isolate(setup: dict[str, Any], report_fd: int) -> None:
    """Start the go-between and give it its ids: only a process outside can map more than one."""
    outside, inside = socket.socketpair()
    child = os.fork()
    if child == 0:
        with _reported(report_fd):
            outside.close()
            _die_with(os.getppid())
            os.unshare(
                os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET
                | os.CLONE_NEWIPC | os.CLONE_NEWUTS | os.CLONE_NEWCGROUP
            )  # fmt: skip
            inside.send(b"?")
            if not inside.recv(1):
                os._exit(1)
            inside.close()
            _go_between(setup, report_fd)
    inside.close()
    if outside.recv(1):
        _map_ids(child)
        outside.send(b"!")
    os.waitpid(child, 0)


def _map_ids(pid: int) -> None:
    """Inside, the command is nobody. Root gives it the id of nobody outside as well, for a count of its own."""
    with open(f"/proc/{pid}/setgroups", "w") as file:
        file.write("deny")
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        only = f"{_NOBODY} {own} 1"
        try:
            _write(f"/proc/{pid}/{name}", f"0 0 1\n{_NOBODY} {_NOBODY} 1" if own == 0 else only)
        except OSError:
            _write(f"/proc/{pid}/{name}", only)


def _go_between(setup: dict[str, Any], report_fd: int) -> NoReturn:
    child = os.fork()  # the first child of a pid namespace is its init
    if child == 0:
        with _reported(report_fd):
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _build_root(setup)
            _prctl(_PR_SET_DUMPABLE, 0)  # the command may have the same id: its memory and files stay shut
            _serve(setup, report_fd, _NOBODY)
    os.waitpid(child, 0)
    os._exit(0)


def _build_root(setup: dict[str, Any]) -> None:
    """A root of a few read-only folders of the host and one small writable one."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in (*setup["read_only"], *_ETC) if os.path.exists(path)}
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in _DEVICES}
    links = {path: os.readlink(path) for path in ("/bin", "/sbin", "/lib", "/lib64") if os.path.islink(path)}
    _mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")
    for path, fd in sources.items():
        if path not in links:
            _bind(fd, _ROOT + path, read_only=True)
    for path, target in links.items():
        os.symlink(target, _ROOT + path)
    for path, fd in devices.items():
        _bind(fd, _ROOT + path, read_only=False)
    os.symlink("/tmp", f"{_ROOT}/dev/shm")
    os.symlink("/proc/self/fd", f"{_ROOT}/dev/fd")
    _write(f"{_ROOT}/etc/passwd", f"nobody:x:{_NOBODY}:{_NOBODY}:nobody:{_WORK}:/bin/sh\n")
    for name in ("proc", "tmp"):
        os.mkdir(f"{_ROOT}/{name}")
    size = f"mode=1777,nr_inodes=10000,size={setup['disk_bytes']}"
    _mount("tmpfs", f"{_ROOT}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, size)
    with contextlib.suppress(OSError):  # no namespaces within the namespace; the filter says so too
        _write("/proc/sys/user/max_user_namespaces", "0")
    with contextlib.suppress(OSError):  # denied in containers that hide parts of /proc: do without
        _mount("proc", f"{_ROOT}/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    socket.sethostname("sandbox")
    _set_attributes(_ROOT, _MOUNT_ATTR_RDONLY, 0)
    os.chdir(_ROOT)
    _check(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")
    os.makedirs(_WORK)
    os.chdir(_WORK)
    for fd in (*sources.values(), *devices.values()):
        os.close(fd)


def _serve(setup: dict[str, Any], report_fd: int, uid: int) -> NoReturn:
    """Lay out the files, run the command, report how it ended, and end."""
    for name, content in setup["files"].items():
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(base64.b64decode(content))
    if uid != os.getuid():
        for folder, _, names in os.walk("."):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                os.chown(path, uid, uid)
    child = os.fork()
    if child == 0:
        with _reported(report_fd):
            os.setsid()
            _limit(setup)
            if setup["isolate"]:
                _drop_rights(uid, base64.b64decode(setup["seccomp"]))
            _execute(setup["command"], setup["environment"])
    while True:
        pid, status = os.wait()
        if pid == child:
            os.write(report_fd, json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
            if not setup["isolate"]:
                _end_children()
            os._exit(0)


def _execute(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Become the command; as with a shell, 127 says that there is none."""
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _end_children() -> None:
    """Kill what the command left, and what is left of that: it all becomes this process's children in turn."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = file.read().split()
        if not children:
            return
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        os.wait()


def _limit(setup: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_AS: setup["memory_bytes"],
        resource.RLIMIT_CPU: setup["cpu_s"],
        resource.RLIMIT_FSIZE: setup["disk_bytes"],
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if setup["isolate"]:  # outside a user namespace it would count everything that the user runs
        limits[resource.RLIMIT_NPROC] = setup["processes"]
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _drop_rights(uid: int, seccomp: bytes) -> None:
    """Nothing that this process or what it executes could get a capability from."""
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # EINVAL past the last one that the kernel knows
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if seccomp:
        code = ctypes.create_string_buffer(seccomp, len(seccomp))
        pointer = _FilterProgram(len(seccomp) // 8, ctypes.addressof(code))
        _check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(pointer), 0, 0), "seccomp")


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("lines", ctypes.c_void_p))


class _Attributes(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def _bind(fd: int, target: str, read_only: bool) -> None:
    if os.path.isdir(f"/proc/self/fd/{fd}"):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _write(target, "")
    _mount(f"/proc/self/fd/{fd}", target, None, _MS_BIND | _MS_REC)
    if read_only:
        _set_attributes(target, _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, _AT_RECURSIVE)


def _set_attributes(target: str, attributes: int, flags: int) -> None:
    wanted = _Attributes(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    done = _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, ctypes.byref(wanted), size)
    _check(done, f"mount_setattr {target}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    text = None if kind is None else kind.encode()
    done = _libc.mount(source.encode(), target.encode(), text, ctypes.c_ulong(flags), options.encode() or None)
    _check(done, f"mount {kind or source} at {target}")


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(what: int, value: int) -> None:
    _check(_libc.prctl(what, value, 0, 0, 0), f"prctl {what}")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
