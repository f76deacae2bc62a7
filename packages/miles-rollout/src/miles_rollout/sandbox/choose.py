"""From a setting to a sandbox."""

import functools

from miles_core.errors import InputError
from miles_core.hooks import load_object
from miles_rollout.sandbox.local import LocalSandbox
from miles_rollout.sandbox.types import Limits, Sandbox, SandboxUnavailable


async def choose_sandbox(sandbox: str = "local", allow_untrusted_exec: bool = False) -> Sandbox:
    """The sandbox to run a model's code in, tried once with a command that does nothing.

    Args:
        sandbox: "local", or "package.module:name" of a Sandbox or of a callable without arguments that makes one.
        allow_untrusted_exec: where the local sandbox is denied, run the code with all that this process has.

    Raises:
        SandboxUnavailable: denied, and not allowed to do without.
        InputError: there is no such sandbox.
    """
    if sandbox != "local":
        return _named(sandbox)
    chosen = _local(isolate=True)
    try:
        await _try(chosen)
    except SandboxUnavailable:
        if not allow_untrusted_exec:
            raise
        chosen = _local(isolate=False)
    return chosen


@functools.cache
def _local(*, isolate: bool) -> LocalSandbox:
    return LocalSandbox(isolate=isolate)  # one for all: it counts how many commands run


@functools.cache
def _named(name: str) -> Sandbox:
    found = load_object(name, "sandbox")
    made = found() if isinstance(found, type) or not hasattr(found, "run") else found
    if not hasattr(made, "run"):
        way_out = "See miles_rollout.sandbox.Sandbox."
        raise InputError(
            "sandbox", name, "must be a Sandbox: something with run(files, command, stdin, limits)", way_out
        )
    return made


_tried: set[LocalSandbox] = set()


async def _try(sandbox: LocalSandbox) -> None:
    if sandbox not in _tried:
        await sandbox.run({}, ["true"], b"", Limits(timeout_s=30.0))
        _tried.add(sandbox)
