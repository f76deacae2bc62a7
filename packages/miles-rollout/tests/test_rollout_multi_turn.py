"""Conversations token by token: what was generated stays, what is new is appended, and masks say which is which."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rollout_chat import END, TEMPLATE, ScriptedEngine, write_chat_model

from miles_core.errors import InputError
from miles_core.hooks import bind
from miles_core.types import Prompt, Sample
from miles_rollout import EngineUnavailable, GenerateContext, GenerateFn, LostSample, SamplingParams, Tokenizer
from miles_rollout.generate import Tool, multi_turn
from miles_rollout.generate.chat import ChatFormat
from miles_rollout.generate.tools import read_tool_calls

QUESTION = Prompt("p", "What is 2+2?")
CALL = 'Let me see. <tool_call>{"name":"add",  "arguments": {"a": 2, "b": 2}}</tool_call>'


async def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


async def sleep(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return "slept"


TOOLS = [add, sleep]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(write_chat_model(tmp_path_factory.mktemp("multi-turn"))))


def talk(tokenizer: Tokenizer, lines: Sequence[Any], **options: Any) -> tuple[Any, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer.encode_more, lines)
    sampling = SamplingParams(200, stop_token_ids=tokenizer.stop_token_ids)
    context = GenerateContext(engine, tokenizer, sampling, weight_version=5)  # type: ignore[arg-type]
    (made,) = asyncio.run(multi_turn(QUESTION, [77], context, **options))
    return made, engine


def text(tokenizer: Tokenizer, ids: Any) -> str:
    return tokenizer.decode(np.asarray(ids, np.int32))


def segments(sample: Sample) -> list[tuple[bool, list[int]]]:
    """Runs of tokens with the same mask."""
    edges = np.flatnonzero(np.diff(sample.loss_mask)) + 1
    runs = zip(np.split(sample.tokens, edges), np.split(sample.loss_mask, edges), strict=True)
    return [(bool(mask[0]), tokens.tolist()) for tokens, mask in runs]


def test_tokens_are_appended_and_masked_by_who_wrote_them(tokenizer: Tokenizer) -> None:
    sample, engine = talk(tokenizer, [CALL, "It is 4."], tools=TOOLS)
    assert isinstance(sample, Sample)
    first, called, result, said = segments(sample)
    assert [mask for mask, _ in (first, called, result, said)] == [False, True, False, True]
    assert text(tokenizer, first[1]).endswith("<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n")
    assert '"name": "add"' in text(tokenizer, first[1])
    assert called[1] == [token for character in CALL for token in tokenizer.encode_more(character)] + [2]
    assert called[1] != tokenizer.encode_more(CALL + END)
    appended = "\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert result[1] == tokenizer.encode_more(appended)
    assert text(tokenizer, said[1]) == "It is 4.<|im_end|>" and sample.text == "It is 4."
    assert engine.prompts == [first[1], first[1] + called[1] + result[1]]
    sampled = sample.rollout_logprobs != 0
    assert (sampled == sample.loss_mask).all()
    assert sample.rollout_logprobs[len(first[1])] == -1 - 1 / 64
    assert sample.version_spans == (
        (len(first[1]), len(first[1] + called[1]), 5),
        (len(sample.tokens) - len(said[1]), len(sample.tokens), 5),
    )
    assert (sample.finish_reason, sample.metadata["ended"], sample.metadata["turns"]) == ("stop", "reply", 2)
    assert sample.metadata["rewritten_turns"] == 0
    roles = [message["role"] for message in sample.metadata["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert engine.seeds[0] == 77 and engine.seeds[1] not in (77, engine.seeds[0])


def test_what_the_template_says_is_what_the_model_sees(tokenizer: Tokenizer) -> None:
    """Where nothing is rewritten, the tokens read as the template renders the whole conversation."""
    canonical = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
    sample, _ = talk(tokenizer, ["\n" + canonical, "4"], tools=TOOLS)
    chat = ChatFormat(tokenizer, [Tool.from_function(tool).schema for tool in TOOLS])
    rendered = tokenizer.render(sample.metadata["messages"], tools=chat.tools, add_generation_prompt=False)
    assert text(tokenizer, sample.tokens) + "\n" == rendered


def test_errors_of_tools_go_to_the_model(tokenizer: Tokenizer) -> None:
    calls = [
        '{"name": "subtract", "arguments": {}}', '{"name": "add", "arguments": {"a": 1}}', "{name: add}", '{"a": 1}',
        '{"name": "sleep", "arguments": {"seconds": 60}}', '{"name": "add", "arguments": {"a": 1, "b": "x"}}',
    ]  # fmt: skip
    line = "".join(f"<tool_call>{call}</tool_call>" for call in calls)
    sample, _ = talk(tokenizer, [line, "I give up."], tools=TOOLS, tool_timeout_s=0.05)
    said = [message["content"] for message in sample.metadata["messages"] if message["role"] == "tool"]
    wanted = [
        "no tool 'subtract'. There are: add, sleep", "TypeError: add() missing", "not valid JSON", "a tool call is {",
        "sleep gave no answer in 0.05 s", "TypeError: unsupported operand",
    ]  # fmt: skip
    assert all(part in content for part, content in zip(wanted, said, strict=True))
    ids = [message["tool_call_id"] for message in sample.metadata["messages"] if message["role"] == "tool"]
    assert len(set(ids)) == 6 and all(len(call_id) == 9 for call_id in ids)


def test_a_long_result_is_cut(tokenizer: Tokenizer) -> None:
    async def flood() -> str:
        return "x" * 10_000_000

    tool = Tool("flood", "", {"type": "object", "properties": {}}, flood)
    sample, engine = talk(tokenizer, ['<tool_call>{"name": "flood"}</tool_call>'], tools=[tool], max_total_tokens=2000)
    assert (sample.finish_reason, sample.metadata["ended"]) == ("stop", "max_total_tokens")
    assert len(engine.prompts) == 1 and segments(sample)[-1][0]


def test_limits(tokenizer: Tokenizer) -> None:
    sample, engine = talk(tokenizer, [CALL, CALL, "never"], tools=TOOLS, max_turns=2)
    assert (sample.metadata["ended"], sample.metadata["turns"]) == ("max_turns", 2) and len(engine.lines) == 1
    _, engine = talk(tokenizer, ["4..."])
    prompt = len(engine.prompts[0])
    sample, engine = talk(tokenizer, ["It is..."], max_total_tokens=prompt + 5)
    assert sample.finish_reason == "length" and engine.asked[0].max_new_tokens == 5
    lost, _ = talk(tokenizer, [], max_total_tokens=prompt)
    assert lost == LostSample("prompt too long", f"{prompt} tokens, max_total_tokens = {prompt}")
    lost, _ = talk(tokenizer, [CALL, EngineUnavailable("engine too slow", "3 s")], tools=TOOLS)
    assert lost == LostSample("engine too slow", "3 s")


async def patient(prompt: Prompt, messages: Sequence[Mapping[str, Any]]) -> str | None:
    return "Sure?" if len(messages) == 2 else None


def test_a_user_answers_and_thoughts_stay(tokenizer: Tokenizer) -> None:
    """The template leaves out earlier thoughts once a user speaks again: counted, and the tokens stay."""
    sample, engine = talk(tokenizer, ["<think>2+2</think>\n4", "Yes."], user=patient)
    first, thought, question, said = segments(sample)
    assert text(tokenizer, thought[1]) == "<think>2+2</think>\n4<|im_end|>"
    assert text(tokenizer, question[1]) == "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    assert engine.prompts[1] == first[1] + thought[1] + question[1]
    assert sample.metadata["rewritten_turns"] == 1 and sample.metadata["turns"] == 2 and said[0]
    sample, _ = talk(tokenizer, ["4", "Yes."], user="test_rollout_multi_turn:patient")
    assert sample.metadata["rewritten_turns"] == 0


def test_a_reply_that_was_broken_off_is_closed_for_the_template(tokenizer: Tokenizer) -> None:
    sample, _ = talk(tokenizer, ["It is...", "4"], user=patient)
    _, (trained, broken), (_, closing), _ = segments(sample)
    assert trained and text(tokenizer, broken) == "It is"
    assert text(tokenizer, closing).startswith("<|im_end|>\n<|im_start|>user\nSure?")


def test_a_template_that_hides_replies_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    hiding = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="does not show the content of an assistant's message"):
        talk(Tokenizer(str(write_chat_model(tmp_path, hiding))), ["4", "4"], user=patient)
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}" + TEMPLATE
    with pytest.raises(InputError, match=r"refuses them: one at a time\. Change the messages"):
        talk(Tokenizer(str(write_chat_model(tmp_path, refusing))), ["4", "4"], user=patient)
    escaping = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match=r"refuses them: .*unsafe"):
        talk(Tokenizer(str(write_chat_model(tmp_path, escaping))), ["4"])


def test_it_attaches_from_a_recipe_and_wrong_tools_are_refused() -> None:
    bind(multi_turn, {"tools": "test_rollout_multi_turn:TOOLS", "max_turns": 3}, "hooks.generate", GenerateFn)
    context: Any = None
    for tools, message in {
        "test_rollout_multi_turn:QUESTION": "must be a list of tools",
        (add, add): "names must differ",
        (len,): "must be an async function",
        (patient,): "must have type hints and a docstring",
    }.items():
        with pytest.raises(InputError, match=message):
            asyncio.run(multi_turn(QUESTION, [1], context, tools=tools))  # type: ignore[arg-type]


def test_reading_calls() -> None:
    assert read_tool_calls("no call <tool_call>{", "s") == ("no call <tool_call>{", [])
    said, calls = read_tool_calls('a <tool_call>{"name": "f", "arguments": {"é": [1]}}</tool_call> b', "s")
    assert said == "a  b" and (calls[0].name, calls[0].arguments, calls[0].error) == ("f", '{"é": [1]}', "")
    assert read_tool_calls('<tool_call>{"name": "f"}</tool_call>', "t")[1][0].id != calls[0].id
