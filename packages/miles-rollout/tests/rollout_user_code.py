"""Rewards as a user may write them, for better or worse. Each misbehaves on the response "BAD" alone."""

import os
import signal
import sys
import time
from typing import Any

from miles_core.types import Prompt, Sample


def length(prompt: Prompt, sample: Sample, *, scale: float = 1.0) -> float:
    return scale * sample.response_len + len(prompt.content)


async def parts(prompt: Prompt, sample: Sample) -> dict[str, float]:
    return {"reward": 0.5, "first": float(sample.tokens[0]), "last": float(sample.rollout_logprobs[-1])}


def environment(prompt: Prompt, sample: Sample) -> float:
    return float(sum("SECRET" in name or "TOKEN" in name or "KEY" in name for name in os.environ))


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
