"""What owner and reward process say to each other: msgpack frames, each after its length, over one socket.

    owner                          process
    Setup ───────────────────────▶ limits itself, imports the reward
          ◀─────────────────────── Ready, or its `error` and the end
    Call (a prompt, its samples) ▶
          ◀─────────────────────── Verdict of sample 0
          ◀─────────────────────── Verdict of sample 1 ...

Nothing is pickled: neither side can make the other run code by what it sends.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from miles_core.types import Prompt, Sample, VersionSpan

HEADER_BYTES = 4
# A reply larger than this is not a reward.
MAX_REPLY_BYTES = 1 << 20


class Setup(msgspec.Struct):
    """What the process is to be."""

    reward: str
    group: bool
    params: dict[str, Any]
    sys_path: list[str]
    memory_bytes: int
    owner_pid: int


class Ready(msgspec.Struct):
    """It is, or why not."""

    error: str = ""


class WireSample(msgspec.Struct, array_like=True):
    """A sample; arrays as their bytes."""

    tokens: bytes
    loss_mask: bytes
    rollout_logprobs: bytes
    version_spans: list[tuple[int, int, int]]
    finish_reason: str
    text: str
    metadata: dict[str, Any]


class Call(msgspec.Struct, array_like=True):
    """Judge these samples of this prompt."""

    id: str
    content: Any
    metadata: Any
    samples: list[WireSample]


class Reply(msgspec.Struct, array_like=True):
    """The verdict of one sample."""

    reward: float
    parts: dict[str, float]
    failure: str
    detail: str


def pack(message: msgspec.Struct) -> bytes:
    """One frame."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(HEADER_BYTES) + body


def call_of(prompt: Prompt, samples: list[Sample]) -> Call:
    """Prompt and samples as they travel. Routed experts stay behind: large, and no reward reads them."""
    return Call(prompt.id, prompt.content, prompt.metadata, [_wire(sample) for sample in samples])


def prompt_of(call: Call) -> Prompt:
    """The prompt that travelled."""
    return Prompt(call.id, call.content, call.metadata)


def sample_of(wire: WireSample) -> Sample:
    """The sample that travelled."""
    return Sample(
        tokens=np.frombuffer(wire.tokens, np.int32),
        loss_mask=np.frombuffer(wire.loss_mask, np.bool_),
        rollout_logprobs=np.frombuffer(wire.rollout_logprobs, np.float32),
        version_spans=tuple(VersionSpan(*span) for span in wire.version_spans),
        finish_reason=wire.finish_reason,
        text=wire.text,
        metadata=wire.metadata,
    )


def _wire(sample: Sample) -> WireSample:
    metadata: Mapping[str, Any] = sample.metadata
    return WireSample(
        np.ascontiguousarray(sample.tokens, np.int32).tobytes(),
        np.ascontiguousarray(sample.loss_mask, np.bool_).tobytes(),
        np.ascontiguousarray(sample.rollout_logprobs, np.float32).tobytes(),
        [(span.start, span.stop, span.weight_version) for span in sample.version_spans],
        sample.finish_reason,
        sample.text,
        dict(metadata),
    )
