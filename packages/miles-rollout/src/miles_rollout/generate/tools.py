"""Tools: what a model may call, how a call is read from its text, and how it is answered.

The format is that of Hermes and Qwen, one JSON object in each pair of tags:

    Let me see. <tool_call>{"name": "add", "arguments": {"a": 2, "b": 2}}</tool_call>
"""

import asyncio
import hashlib
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError
from miles_core.hooks import load_object
from miles_rollout.generate.chat import Message

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MAX_RESULT_CHARACTERS = 1 << 16  # a result beyond any context would first be tokenised, second by second


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that the model may call.

    Attributes:
        name: that the model calls it by.
        description: for the model.
        parameters: JSON schema of the arguments, an object.
        call: takes the arguments by name; text is given to the model as it is, anything else as JSON.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[..., Awaitable[Any]]

    @property
    def schema(self) -> Mapping[str, Any]:
        """As chat templates and OpenAI's API have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @classmethod
    def from_function(cls, function: Callable[..., Awaitable[Any]]) -> "Tool":
        """Make a tool of an async function with type hints and a docstring that describes each argument.

        Raises:
            InputError: it is not async, or type hints or descriptions are missing.
        """
        from transformers.utils.chat_template_utils import get_json_schema  # noqa: PLC0415  takes a second

        setting = f"tool {getattr(function, '__name__', function)}"
        if not inspect.iscoroutinefunction(function):
            raise InputError(setting, type(function).__name__, "must be an async function", "Write `async def`.")
        try:
            schema = get_json_schema(function)["function"]
        except Exception as error:  # the parser of docstrings has errors of many kinds
            raise InputError(
                setting,
                str(inspect.signature(function)),
                f"must have type hints and a docstring with a summary and `Args:` ({error})",
                "Add them, or make a Tool(name, description, parameters, call).",
            ) from error
        return cls(schema["name"], schema["description"], schema["parameters"], function)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made.

    Attributes:
        id: nine letters and digits, unlike others of the conversation.
        name: of the tool.
        arguments: a JSON object, as text.
        error: what is wrong with the call as written; empty for one that can be read.
    """

    id: str
    name: str
    arguments: str
    error: str = ""

    @property
    def message(self) -> Mapping[str, Any]:
        """As chat templates have it: the arguments as an object."""
        function = {"name": self.name, "arguments": json.loads(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def load_tools(tools: Sequence[Tool] | str) -> Mapping[str, Tool]:
    """Tools by name, given as objects or as `"package.module:NAME"` of a sequence of tools and async functions.

    Raises:
        InputError: the name cannot be loaded or is not a sequence, something in it is no tool, or two share a name.
    """
    found: Any = load_object(tools, "tools") if isinstance(tools, str) else tools
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise InputError("tools", found, "must be a list of tools and async functions", "Name such a list.")
    each = [tool if isinstance(tool, Tool) else Tool.from_function(tool) for tool in found]
    named = {tool.name: tool for tool in each}
    if len(named) != len(each):
        raise InputError("tools", [tool.name for tool in each], "names must differ", "Rename one.")
    return named


def read_tool_calls(text: str, salt: str) -> tuple[str, list[ToolCall]]:
    """Split a reply into what it says and what it calls.

    Args:
        text: the reply.
        salt: ids derive from it, so that the same conversation has the same ids.

    Returns:
        The text without calls (as it is where there are none), and the calls in their order. A call that cannot be
        read has an `error`, no name and `{}`.
    """
    blocks = _CALL.findall(text)
    calls = [_read_call(block, _call_id(salt, number)) for number, block in enumerate(blocks)]
    return (_CALL.sub("", text).strip() if calls else text), calls


async def answer(call: ToolCall, tools: Mapping[str, Tool], timeout_s: float) -> Message:
    """Run a call and make the tool message of its result; whatever goes wrong is told to the model.

    Args:
        call: of the model.
        tools: by name.
        timeout_s: seconds that the tool has.
    """
    return {
        "role": "tool",
        "tool_call_id": call.id,
        "name": call.name,
        "content": await _result(call, tools, timeout_s),
    }


async def _result(call: ToolCall, tools: Mapping[str, Tool], timeout_s: float) -> str:
    if call.error:
        return f"Error: {call.error}"
    if call.name not in tools:
        return f"Error: there is no tool {call.name!r}. There are: {', '.join(sorted(tools)) or 'none'}."
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            result = await tools[call.name].call(**json.loads(call.arguments))
        text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except Exception as error:  # noqa: BLE001  whatever a tool raises is an answer to the model
        if isinstance(error, TimeoutError) and limit.expired():
            return f"Error: {call.name} gave no answer in {timeout_s:g} s."
        text = f"Error: {type(error).__name__}: {error}"
    if len(text) > _MAX_RESULT_CHARACTERS:
        return f"{text[:_MAX_RESULT_CHARACTERS]} [cut: {len(text)} characters]"
    return text


def _read_call(block: str, call_id: str) -> ToolCall:
    try:
        call = json.loads(block)
    except ValueError as error:
        return ToolCall(call_id, "", "{}", f"the tool call is not valid JSON: {error}")
    arguments = call.get("arguments", {}) if isinstance(call, dict) else None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(arguments, dict)):
        return ToolCall(call_id, "", "{}", 'a tool call is {"name": "...", "arguments": {...}}')
    return ToolCall(call_id, call["name"], json.dumps(arguments, ensure_ascii=False))


def _call_id(salt: str, number: int) -> str:
    # Nine characters: what Mistral's template insists on.
    return hashlib.blake2b(f"{salt}/{number}".encode(), digest_size=5).hexdigest()[:9]
