"""A maker of samples that every test file may shape to its needs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from miles_core import Group, Prompt, Sample, VersionSpan

settings.register_profile("core", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("core")


def _make_sample(prompt_len: int = 2, response_len: int = 3, reward: float = 0.0, **changes: Any) -> Sample:
    length = prompt_len + response_len
    loss_mask = np.arange(length) >= prompt_len
    values: dict[str, Any] = {
        "tokens": np.arange(length, dtype=np.int32),
        "loss_mask": loss_mask,
        "rollout_logprobs": np.where(loss_mask, np.float32(-0.5), np.float32(0)),
        "version_spans": (VersionSpan(prompt_len, length, 3),),
        "finish_reason": "stop",
        "reward": reward,
    }
    return Sample(**(values | changes))


def _make_group(lengths: list[int], rewards: list[float] | None = None, name: str = "p") -> Group:
    pairs = zip(lengths, rewards or [0.0] * len(lengths), strict=True)
    return Group(Prompt(name, "text"), tuple(_make_sample(response_len=n, reward=r) for n, r in pairs))


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    return _make_sample


@pytest.fixture(scope="session")
def make_group() -> Callable[..., Group]:
    return _make_group
