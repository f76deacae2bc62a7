"""Single-turn environments of the verifiers library, judged by their own rubric. Needs miles-rollout[verifiers]."""

import contextlib
import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from miles_core.errors import InputError
from miles_core.types import Prompt, Sample

try:
    _library: Any = importlib.import_module("verifiers")
except ImportError as error:
    raise ImportError('verifiers is not installed: pip install "miles-rollout[verifiers]"') from error


async def verifiers(
    prompt: Prompt, sample: Sample, *, environment: str, arguments: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """The reward that an environment's rubric gives; its metrics are the parts.

    A rubric sees the prompt, the response as one assistant message, and of the prompt's metadata `answer`, `task` and
    `info` (a table, or JSON text of it), the columns of an environment's dataset. Rubrics of whole groups and those
    that need the environment's own rollout are not for this reward. verifiers counts a reward function that raises
    as 0.

    Args:
        prompt: a row of the environment's dataset.
        sample: judged by its text.
        environment: its id, as verifiers.load_environment takes it; installed.
        arguments: of the environment.

    Raises:
        InputError: there is no such environment, or none with a rubric of this kind.
    """
    rubric = _rubric(environment, json.dumps(dict(arguments or {}), sort_keys=True))
    info = prompt.metadata.get("info", {})
    messages = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else prompt.content
    state = {
        "prompt": [dict(message) for message in messages],
        "completion": [{"role": "assistant", "content": sample.text}],
        "answer": prompt.metadata.get("answer", ""),
        "task": prompt.metadata.get("task", "default"),
        "info": json.loads(info) if isinstance(info, str) else info,
        "trajectory": [],
        "timing": {"generation_ms": 0.0, "scoring_ms": 0.0, "total_ms": 0.0, "start_time": 0.0},
    }
    if "score_sem" in inspect.signature(rubric.score_rollout).parameters:
        await rubric.score_rollout(state, score_sem=contextlib.nullcontext())
    else:
        await rubric.score_rollout(state)
    return {**state.get("metrics", {}), "reward": state["reward"]}


async def _prepare(*, environment: str, arguments: Mapping[str, Any] | None = None) -> None:
    _rubric(environment, json.dumps(dict(arguments or {}), sort_keys=True))


verifiers.prepare = _prepare  # pyright: ignore[reportFunctionMemberAccess]  see miles_rollout.rewards.judge.prepare


@functools.cache
def _rubric(environment: str, arguments: str) -> Any:
    way_out = "Install the environment and a verifiers library of version 0.1."
    if not hasattr(_library, "load_environment"):
        raise InputError(
            "hooks.reward.environment", environment, "this verifiers library has no load_environment", way_out
        )
    try:
        rubric = _library.load_environment(environment, **json.loads(arguments)).rubric
    except Exception as error:  # an environment is somebody's code
        raise InputError(
            "hooks.reward.environment", environment, f"cannot be loaded ({type(error).__name__}: {error})", way_out
        ) from error
    if not hasattr(rubric, "score_rollout"):
        raise InputError("hooks.reward.environment", environment, "its rubric has no score_rollout", way_out)
    return rubric
