"""Running code that a model wrote: the protocol, and the sandbox of this host."""

from miles_rollout.sandbox.choose import choose_sandbox
from miles_rollout.sandbox.local import LocalSandbox
from miles_rollout.sandbox.types import Ending, Limits, Result, Sandbox, SandboxUnavailable

__all__ = [
    "Ending",
    "Limits",
    "LocalSandbox",
    "Result",
    "Sandbox",
    "SandboxUnavailable",
    "choose_sandbox",
]
