"""A reward process: `python -m miles_rollout.rewards._process SOCKET_FD`, started by miles_rollout.rewards.pool."""

import asyncio
import ctypes
import inspect
import os
import resource
import signal
import socket
import sys
from typing import Any

import msgspec

from miles_core.config import HookSpec
from miles_core.hooks import GroupReward, Reward, load_hook
from miles_rollout.rewards import _wire
from miles_rollout.rewards.judge import Verdict, prepare, verdict_of, verdicts_of

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> None:
    """Judge until the owner closes the socket or dies."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    setup = _receive(channel, _wire.Setup)
    if setup is None:
        return
    _bind_to(setup.owner_pid)
    sys.path[:] = setup.sys_path
    runner = asyncio.Runner()  # one loop for all calls, so that a reward may keep connections
    try:
        _limit_memory(setup.memory_bytes)
        kind, setting = (GroupReward, "hooks.group_reward") if setup.group else (Reward, "hooks.reward")
        reward = load_hook(HookSpec(name=setup.reward, params=setup.params), setting, kind)
        runner.run(prepare(reward, setup.reward))
    except BaseException as error:  # noqa: BLE001  importing user code may do anything
        channel.sendall(_wire.pack(_wire.Ready(error=f"{type(error).__name__}: {error}"[:2000])))
        return
    channel.sendall(_wire.pack(_wire.Ready()))
    while (call := _receive(channel, _wire.Call)) is not None:
        prompt = _wire.prompt_of(call)
        samples = [_wire.sample_of(wire) for wire in call.samples]
        if setup.group:
            verdicts = iter(_judge_group(runner, reward, prompt, samples, setup.reward))
        else:
            verdicts = (_judge(runner, reward, prompt, sample, setup.reward) for sample in samples)
        for verdict in verdicts:
            channel.sendall(_wire.pack(_reply(verdict)))


def _bind_to(owner_pid: int) -> None:
    """Die with the owner; so do children made by Python's fork. Orphaned grandchildren become ours, to be found."""
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    die_with_parent()
    os.register_at_fork(after_in_child=die_with_parent)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != owner_pid:
        os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Limit the address space to what the interpreter has now, plus `memory_bytes` for the reward and its imports."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory_bytes, now + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _judge(runner: asyncio.Runner, reward: Any, prompt: Any, sample: Any, name: str) -> Verdict:
    value = _call(runner, reward, prompt, sample, name)
    return value if isinstance(value, Verdict) else verdict_of(value, name)


def _judge_group(runner: asyncio.Runner, reward: Any, prompt: Any, samples: list[Any], name: str) -> list[Verdict]:
    values = _call(runner, reward, prompt, samples, name)
    return [values] * len(samples) if isinstance(values, Verdict) else verdicts_of(values, len(samples), name)


def _call(runner: asyncio.Runner, reward: Any, prompt: Any, judged: Any, name: str) -> Any:
    """What the function returns, or a Verdict of why it did not."""
    try:
        value = reward(prompt, judged)
        return runner.run(_wait(value)) if inspect.isawaitable(value) else value
    except MemoryError:
        return Verdict(failure="reward out of memory", detail=f"{name}: reward.memory_bytes is too little for it")
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever user code raises is data here
        return Verdict(failure="reward raised", detail=f"{name}: {type(error).__name__}: {error}"[:2000])


async def _wait(value: Any) -> Any:
    return await value


def _reply(verdict: Verdict) -> _wire.Reply:
    return _wire.Reply(verdict.reward, dict(verdict.parts), verdict.failure, verdict.detail)


def _receive[T: msgspec.Struct](channel: socket.socket, kind: type[T]) -> T | None:
    """One message, or None when the owner is gone."""
    header = _read(channel, _wire.HEADER_BYTES)
    body = _read(channel, int.from_bytes(header)) if header else b""
    return msgspec.msgpack.decode(body, type=kind) if body else None


def _read(channel: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = channel.recv(min(count - len(data), 1 << 20))
        if not piece:
            return b""
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main()
