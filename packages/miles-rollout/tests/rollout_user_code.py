"""Rewards as a user may write them, for better or worse. Each misbehaves on the response "BAD" alone."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from miles_core.types import Prompt, Sample


def length(prompt: Prompt, sample: Sample, *, scale: float = 1.0) -> float:
    return scale * sample.response_len + len(prompt.content)


async def parts(prompt: Prompt, sample: Sample) -> dict[str, float]:
    return {"reward": 0.5, "first": float(sample.tokens[0]), "last": float(sample.rollout_logprobs[-1])}


def environment(prompt: Prompt, sample: Sample) -> float:
    return float(sum("SECRET" in name or "TOKEN" in name or "KEY" in name for name in os.environ))


def count_open_files(prompt: Prompt, sample: Sample) -> float:
    return float(len([name for name in os.listdir("/proc/self/fd") if int(name) > 2]))


async def same_loop(prompt: Prompt, sample: Sample, *, seen: list[int]) -> float:
    """How many loops the samples so far were judged in."""
    seen.append(id(asyncio.get_running_loop()))
    return float(len(set(seen)))


def needs_a_key(prompt: Prompt, sample: Sample, *, key: str = "") -> float:
    return 1.0


def _check_key(*, key: str = "") -> None:
    if not key:
        raise ValueError("no key")


needs_a_key.prepare = _check_key  # type: ignore[attr-defined]


async def ranks(prompt: Prompt, samples: Sequence[Sample], *, how: str = "") -> Any:
    """Place of each sample by the length of its text."""
    if any(sample.text == "BAD" for sample in samples):
        globals()[how]()
    order = sorted(len(sample.text) for sample in samples)
    places = [float(order.index(len(sample.text))) for sample in samples]
    return places[:-1] if samples[0].text == "few" else places


def misbehave(prompt: Prompt, sample: Sample, *, how: str) -> Any:
    return 1.0 if sample.text != "BAD" else globals()[how]()


def hang() -> None:
    while True:
        pass


def hang_deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


def allocate() -> None:
    kept = []
    while True:
        kept.append(bytearray(1 << 22))


def allocate_in_children() -> None:
    """Each has less than the limit of a process; all together have more."""
    for _ in range(8):
        if os.fork() == 0:
            kept = bytearray(os.urandom(1 << 20)) * 64
            time.sleep(1000 + len(kept) % 2)
    time.sleep(1000)


def leave_processes() -> float:
    """More than the limit of a call, and it returns at once."""
    for _ in range(80):
        subprocess.Popen(["sleep", "1000"])
    return 1.0


def daemonise_and_die() -> None:
    """What is left has another session, another group and no parent of ours."""
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    os._exit(3)


def print_much() -> None:
    for _ in range(100):
        print("x" * (1 << 20))


def raise_error() -> None:
    raise KeyError("answer")


def exit_python() -> None:
    sys.exit(3)


def exit_process() -> None:
    os._exit(3)


def give_nan() -> float:
    return float("nan")


def give_text() -> str:
    return "good"


def give_no_total() -> dict[str, float]:
    return {"part": 1.0}


def fork_without_end() -> None:
    for _ in range(7):  # 128 processes: enough to be noticed, and no danger to a machine whose owner looks away
        os.fork()
    time.sleep(1000)


def hide_a_process() -> None:
    """A grandchild in a session of its own, whose parent is gone."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    time.sleep(1000)
