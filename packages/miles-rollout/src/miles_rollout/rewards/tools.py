"""Calls of tools, compared as JSON."""

import json
from collections.abc import Mapping
from typing import Any

import regex

from miles_core.types import Prompt, Sample
from miles_rollout.rewards.metadata import structure

_CALL = regex.compile(r"<tool_call>(.*?)</tool_call>", regex.DOTALL)


def tool_calls(prompt: Prompt, sample: Sample, *, key: str = "tool_calls") -> dict[str, float]:
    """Share of right tool calls: those that are wanted and made, over the greater number of wanted and made ones.

    Calls are read from <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes and Qwen models write them.
    Their order does not count; arguments must be equal as JSON. No call wanted and none made is 1. The part "names" is
    the same share for names alone, "json" is 1 if every call can be read.

    Args:
        prompt: its metadata holds the wanted calls: a list of {"name": ..., "arguments": {...}}.
        sample: judged by its text.
        key: of the metadata.
    """
    wanted = [_call(call) for call in structure(prompt, key)]
    made: list[tuple[str, str] | None] = []
    for text in _CALL.findall(sample.text):
        try:
            made.append(_call(json.loads(text)))
        except (ValueError, TypeError, KeyError, AttributeError):
            made.append(None)
    return {
        "reward": _share(wanted, made),
        "names": _share([call[0] for call in wanted], [call and call[0] for call in made]),
        "json": float(None not in made),
    }


def _call(call: Mapping[str, Any]) -> tuple[str, str]:
    """Name and arguments of a call, the same text for the same arguments."""
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # the OpenAI API has them as text
        arguments = json.loads(arguments)
    return str(call["name"]), json.dumps(arguments, sort_keys=True)


def _share(wanted: list[Any], made: list[Any]) -> float:
    if not wanted and not made:
        return 1.0
    left = list(made)
    for item in wanted:
        if item in left:
            left.remove(item)
    return (len(made) - len(left)) / max(len(wanted), len(made))
