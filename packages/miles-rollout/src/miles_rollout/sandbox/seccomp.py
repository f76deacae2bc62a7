"""A filter of system calls, as a BPF program: what opens the kernel wider than a program of a contest ever needs.

Denied calls give EPERM. `clone` may make threads and processes but no user namespaces; `clone3`, whose arguments a
filter cannot see, gives ENOSYS, at which glibc falls back to `clone`. Layout: linux/filter.h, linux/seccomp.h.
"""

import platform
import struct

_EPERM, _ENOSYS = 1, 38
_CLONE_NEWUSER = 0x10000000
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_FIRST_ARGUMENT = 0, 4, 16

# AUDIT_ARCH, then numbers from asm/unistd.h: clone, clone3, and what is denied.
_CALLS = {
    "x86_64": (
        0xC000003E,
        56,
        435,
        {
            "ptrace": 101, "syslog": 103, "pivot_root": 155, "chroot": 161, "acct": 163, "mount": 165, "umount2": 166,
            "swapon": 167, "reboot": 169, "init_module": 175, "kexec_load": 246, "add_key": 248, "request_key": 249,
            "keyctl": 250, "unshare": 272, "perf_event_open": 298, "setns": 308, "process_vm_readv": 310,
            "process_vm_writev": 311, "finit_module": 313, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
            "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
        },
    ),
    "aarch64": (
        0xC00000B7,
        220,
        435,
        {
            "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "acct": 89, "unshare": 97, "kexec_load": 104,
            "init_module": 105, "syslog": 116, "ptrace": 117, "reboot": 142, "add_key": 217, "request_key": 218,
            "keyctl": 219, "swapon": 224, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270,
            "process_vm_writev": 271, "finit_module": 273, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425,
            "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
        },
    ),
}  # fmt: skip
_X32 = 0x40000000  # x86-64's second set of numbers, which no filter by number would catch


def program() -> bytes:
    """The filter for this machine's architecture; empty where none is known."""
    if platform.machine() not in _CALLS:
        return b""
    architecture, clone, clone3, denied = _CALLS[platform.machine()]
    lines = [
        _line(_LOAD, _OFFSET_ARCHITECTURE),
        _line(_JUMP_EQUAL, architecture, then=1),
        _line(_RETURN, _KILL),
        _line(_LOAD, _OFFSET_NUMBER),
        _line(_JUMP_AT_LEAST, _X32, otherwise=1),
        _line(_RETURN, _ERRNO | _ENOSYS),
        _line(_JUMP_EQUAL, clone3, otherwise=1),
        _line(_RETURN, _ERRNO | _ENOSYS),
    ]
    for number in denied.values():
        lines += [_line(_JUMP_EQUAL, number, otherwise=1), _line(_RETURN, _ERRNO | _EPERM)]
    lines += [
        _line(_JUMP_EQUAL, clone, otherwise=3),
        _line(_LOAD, _OFFSET_FIRST_ARGUMENT),
        _line(_JUMP_ANY_BIT, _CLONE_NEWUSER, otherwise=1),
        _line(_RETURN, _ERRNO | _EPERM),
        _line(_RETURN, _ALLOW),
    ]
    return b"".join(lines)


def _line(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; a jump skips `then` or `otherwise` lines."""
    return struct.pack("=HBBI", code, then, otherwise, value)
