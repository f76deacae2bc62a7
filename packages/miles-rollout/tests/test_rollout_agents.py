"""Agents that know OpenAI's client alone, against the endpoint, with an engine that says what it is told to."""

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from rollout_chat import ScriptedEngine, write_chat_model

from miles_core.batching import make_batch
from miles_core.errors import InputError
from miles_core.hooks import bind
from miles_core.types import Group, Prompt, Sample
from miles_rollout import (
    EngineUnavailable,
    GenerateContext,
    GenerateFn,
    LostSample,
    SamplingParams,
    Tokenizer,
    multi_turn,
)
from miles_rollout.agents import Endpoint, agent_rollout, load_agent
from miles_rollout.generate import Tool

QUESTION = Prompt("p", "What is 2+2?", {"answer": "4"})
CALL = '<tool_call>{"name":"add",  "arguments": {"a": 2, "b": 2}}</tool_call>'
SCHEMA: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Add two numbers.", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(str(write_chat_model(tmp_path_factory.mktemp("agents"))))


def context_of(tokenizer: Tokenizer, lines: Sequence[Any]) -> tuple[GenerateContext, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer.encode_more, lines)
    sampling = SamplingParams(200, stop_token_ids=tokenizer.stop_token_ids)
    return GenerateContext(engine, tokenizer, sampling, weight_version=5), engine  # type: ignore[arg-type]


def attempt(tokenizer: Tokenizer, lines: Sequence[Any], agent: Any, **options: Any) -> tuple[list[Any], ScriptedEngine]:
    context, engine = context_of(tokenizer, lines)
    return asyncio.run(agent_rollout(QUESTION, [77], context, agent=agent, **options)), engine


def client_of(base_url: str, api_key: str, max_retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def tool_agent(base_url: str, api_key: str, prompt: Prompt, *, stream: bool = False) -> dict[str, float]:
    """What anybody writes: ask, call, answer, until there is no call."""
    messages: list[Any] = [user(str(prompt.content))]
    async with client_of(base_url, api_key) as client:
        while True:
            if stream:
                message = await streamed(client, messages)
            else:
                reply = await client.chat.completions.create(model="policy", messages=messages, tools=[SCHEMA])
                message = reply.choices[0].message.model_dump(exclude_none=True)
                assert reply.choices[0].finish_reason == ("tool_calls" if message.get("tool_calls") else "stop")
            messages.append(message)
            if not message.get("tool_calls"):
                return {"reward": float(prompt.metadata["answer"] in message["content"]), "messages": len(messages)}
            for call in message["tool_calls"]:
                content = str(sum(json.loads(call["function"]["arguments"]).values()))
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


async def streamed(client: openai.AsyncOpenAI, messages: list[Any]) -> dict[str, Any]:
    content, calls, usage = "", [], None
    stream = await client.chat.completions.create(
        model="policy", messages=messages, tools=[SCHEMA], stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            calls += [call.model_dump(exclude={"index"}) for call in choice.delta.tool_calls or []]
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_leaves_the_sample_that_multi_turn_would(tokenizer: Tokenizer, stream: bool) -> None:
    """The same lines, through HTTP and OpenAI's client or not: the same tokens, masks, logprobs and spans."""

    async def add(a: int, b: int) -> int:
        return a + b

    lines = ["Let me see. " + CALL, "It is 4."]
    (sample,), engine = attempt(tokenizer, lines, tool_agent, params={"stream": stream})
    context, direct = context_of(tokenizer, lines)
    function = SCHEMA["function"]
    tool = Tool("add", function["description"], function["parameters"], add)
    (wanted,) = asyncio.run(multi_turn(QUESTION, [77], context, tools=[tool]))
    assert isinstance(wanted, Sample)
    assert engine.prompts == direct.prompts and engine.seeds == direct.seeds
    for name in ("tokens", "loss_mask", "rollout_logprobs"):
        np.testing.assert_array_equal(getattr(sample, name), getattr(wanted, name))
        assert getattr(sample, name).dtype == getattr(wanted, name).dtype
    assert sample.version_spans == wanted.version_spans and sample.text == wanted.text == "It is 4."
    assert sample.reward == 1.0 and sample.reward_parts == {"messages": 4.0}
    assert sample.metadata["branches"] == 1 and sample.metadata["turns"] == 2
    # `+` in one and `\\n` in the other: neither was ever written out and read again.
    assert sample.tokens.tolist() != tokenizer.encode_more(tokenizer.decode(sample.tokens))


def test_the_readmes_agent(tokenizer: Tokenizer) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "async def solve" in code]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    (sample,), _ = attempt(tokenizer, ["5", "It is 4."], names["solve"])
    assert sample.reward == 1.0 and sample.metadata["turns"] == 2 and sample.metadata["branches"] == 1


def test_a_history_that_was_changed_is_another_branch(tokenizer: Tokenizer) -> None:
    async def agent(base_url: str, api_key: str, prompt: Prompt) -> float:
        async with client_of(base_url, api_key) as client:

            async def ask(*messages: Any) -> Any:
                reply = await client.chat.completions.create(model="policy", messages=messages)
                return {"role": "assistant", "content": reply.choices[0].message.content}

            first = await ask(user("one"))
            second = await ask(user("one"), first, user("two"))
            await ask(user("one"), first, user("two"), second, user("three"))
            await ask(user("one"), first, user("two again"))  # back to the first turn and on from there
            shortened = {"role": "assistant", "content": first["content"][:1]}
            await ask(user("one"), shortened, user("two"))  # never said: context as the template writes it
        return 0.5

    made, engine = attempt(tokenizer, ["a b", "c", "d", "e", "f"], agent)
    assert [sample.metadata["turns"] for sample in made] == [3, 2, 1]
    assert [sample.metadata["branch"] for sample in made] == [0, 1, 2] and made[0].metadata["branches"] == 3
    trained = [tokenizer.decode(sample.tokens[sample.loss_mask]) for sample in made]
    assert trained == ["a b<|im_end|>c<|im_end|>d<|im_end|>", "e<|im_end|>", "f<|im_end|>"]
    assert {sample.reward for sample in made} == {0.5}
    # What was said in the first turn is the same in the branch: context, with its logprobs, and not trained twice.
    start, stop, _ = made[0].version_spans[0]
    np.testing.assert_array_equal(made[0].tokens[:stop], made[1].tokens[:stop])
    assert not made[1].loss_mask[:stop].any() and made[1].rollout_logprobs[start:stop].all()
    assert "<|im_start|>assistant\na<|im_end|>" in tokenizer.decode(made[2].tokens)
    assert engine.prompts[4] == tokenizer.encode_more(tokenizer.decode(np.asarray(engine.prompts[4], np.int32)))
    make_batch([Group(QUESTION, tuple(made))], np.zeros(3, np.float32))


def test_conversations_at_the_same_time(tokenizer: Tokenizer) -> None:
    async def agent(base_url: str, api_key: str, prompt: Prompt) -> None:
        async with client_of(base_url, api_key) as client:
            ask = client.chat.completions.create
            await asyncio.gather(*[ask(model="policy", messages=[user("the same")]) for _ in range(3)])  # type: ignore

    made, engine = attempt(tokenizer, ["a", "b", "c"], agent)
    assert sorted(sample.text for sample in made) == ["a", "b", "c"] and len(set(engine.seeds)) == 3
    assert all(np.isnan(sample.reward) for sample in made)  # for the recipe's reward to judge


def test_a_reply_sampled_its_own_way_is_context(tokenizer: Tokenizer) -> None:
    async def agent(base_url: str, api_key: str, prompt: Prompt, *, second: float | None) -> float:
        async with client_of(base_url, api_key) as client:
            ask = client.chat.completions.create
            reply = await ask(model="policy", messages=[user("plan")], temperature=0.0)  # type: ignore[list-item]
            said = {"role": "assistant", "content": reply.choices[0].message.content}
            await ask(model="policy", messages=[user("plan"), said, user("act")], temperature=second)  # type: ignore
        return 1.0

    (sample,), engine = attempt(tokenizer, ["p", "a"], agent, params={"second": None})
    assert tokenizer.decode(sample.tokens[sample.loss_mask]) == "a<|im_end|>"
    assert [asked.temperature for asked in engine.asked] == [0.0, 1.0]
    (lost,), _ = attempt(tokenizer, ["p", "a"], agent, params={"second": 0.7})
    assert lost.reason == "agent samples its own way" and "none of 2 replies" in lost.detail


def test_stop_strings_logprobs_and_limits(tokenizer: Tokenizer) -> None:
    async def agent(base_url: str, api_key: str, prompt: Prompt) -> float:
        async with client_of(base_url, api_key) as client:
            reply = await client.chat.completions.create(
                model="policy", messages=[user("?")], stop=["END", "</a>"], logprobs=True, max_tokens=50
            )  # type: ignore[call-overload]
            (choice,) = reply.choices
            assert (choice.message.content, choice.finish_reason) == ("say ", "stop")
            assert "".join(entry.token for entry in choice.logprobs.content) == "say </a>"
            assert choice.logprobs.content[0].logprob == -1 - 1 / 64 and reply.usage.completion_tokens == 8
            said = {"role": "assistant", "content": "say "}
            await client.chat.completions.create(model="policy", messages=[user("?"), said, user("!")], max_tokens=9)
        return 0.0

    (sample,), engine = attempt(tokenizer, ["say </a> and END more", "on..."], agent)
    assert [asked.max_new_tokens for asked in engine.asked] == [50, 9] and sample.metadata["turns"] == 2
    assert tokenizer.decode(sample.tokens[sample.loss_mask]) == "say </a>on"
    assert "say </a><|im_end|>\n<|im_start|>user\n!" in tokenizer.decode(sample.tokens)
    assert sample.version_spans[0].stop - sample.version_spans[0].start == 8 and sample.finish_reason == "length"


def serve(tokenizer: Tokenizer, lines: Sequence[Any], act: Callable[[Endpoint], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        context, _ = context_of(tokenizer, lines)
        async with Endpoint(context, **options) as endpoint:
            return await act(endpoint)

    return asyncio.run(run())


BAD_CALL = {"function": {"name": "f", "arguments": "["}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "at least one"),
    "two choices": ({"n": 2}, r"\$\.n"),
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty = 0.5: must be from 0 to 0"),
    "a schema": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a forced call": ({"tools": [SCHEMA], "tool_choice": "required"}, "tool_choice"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
    "no role": ({"messages": [{"content": "?"}]}, "has no role"),
    "no tokens": ({"max_tokens": 0}, "max_tokens = 0"),
    "a bad call": ({"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]}, "JSON object"),
    "too long": ({"messages": [{"role": "user", "content": "long " * 999}]}, "with the reply they may have 300"),
    "empty stop": ({"stop": [""]}, "empty string"),
}  # fmt: skip


def test_what_cannot_be_honoured_is_refused_by_name(tokenizer: Tokenizer) -> None:
    async def act(endpoint: Endpoint) -> None:
        key, session = endpoint.open(1)
        async with client_of(endpoint.base_url, key) as client:
            for change, message in REFUSED.values():
                body: Any = {"messages": [user("?")]} | change
                with pytest.raises(openai.BadRequestError, match=message):
                    await client.post("/chat/completions", body=body, cast_to=object)
            reply = await client.post(
                "/chat/completions", body={"messages": [user("?")], "presence_penalty": 0.0}, cast_to=object
            )
            assert reply and len(session.turns) == 1  # the engine serves on, and nothing else was recorded
            assert [model.id async for model in client.models.list()] == ["policy"]

    serve(tokenizer, ["fine"], act, max_total_tokens=300)


def test_keys(tokenizer: Tokenizer) -> None:
    async def act(endpoint: Endpoint) -> None:
        (one, _), (other, session) = endpoint.open(1), endpoint.open(2)
        assert endpoint.base_url.startswith("http://127.0.0.1:") and one != other
        for key in ("", "wrong", one + "x", "\u00e9"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with aiohttp.ClientSession(headers=headers) as http:
                async with http.get(f"{endpoint.base_url}/models") as answer:
                    assert answer.status == 401
                async with http.post(f"{endpoint.base_url}/chat/completions", data=b"{}") as answer:
                    assert answer.status == 401 and (await answer.json())["error"]["code"] == "invalid_api_key"
        async with client_of(endpoint.base_url, one) as client:
            await client.chat.completions.create(model="m", messages=[user("?")])  # type: ignore[list-item]
            assert not session.turns and [sample.text for sample in endpoint.close(one)] == ["a"]
            with pytest.raises(openai.AuthenticationError, match="No open rollout has this key"):
                await client.chat.completions.create(model="m", messages=[user("?")])  # type: ignore[list-item]

    serve(tokenizer, ["a", "b"], act)


def test_what_agents_do_wrong_loses_their_sample_alone(tokenizer: Tokenizer) -> None:
    async def agent(base_url: str, api_key: str, prompt: Prompt, *, how: str) -> Any:
        async with client_of(base_url, api_key) as client:
            if how != "silent":
                await client.chat.completions.create(model="policy", messages=[user("?")])  # type: ignore[list-item]
            if how == "raises":
                raise KeyError("plan")
            if how == "exits":
                sys.exit(3)
            if how == "hangs":
                await asyncio.sleep(1000)
            if how == "stubborn":
                while True:
                    try:
                        await asyncio.sleep(1000)
                    except asyncio.CancelledError:
                        await asyncio.sleep(0.2)
                        return 1.0
            return {"nan": float("nan"), "text": "good", "parts": {"part": 1.0}}.get(how, 1.0)

    wanted = {
        "raises": LostSample("agent raised", "KeyError: 'plan'"),
        "exits": LostSample("agent raised", "RuntimeError: SystemExit(3)"),
        "hangs": LostSample("agent timeout", "not done after 0.5 s"),
        "stubborn": LostSample("agent timeout", "not done after 0.5 s"),
        "silent": LostSample("agent asked nothing", "no request was answered with its key"),
        "nan": LostSample("reward not finite", "agent returned nan"),
        "text": LostSample("reward malformed", "agent returned 'good': give numbers"),
        "parts": LostSample("reward malformed", "agent returned no part \"reward\", but ['part']"),
    }
    for how, lost in wanted.items():
        made, _ = attempt(tokenizer, ["a"], agent, params={"how": how}, timeout_s=0.5)
        assert made == [lost], how
    failed = EngineUnavailable("engine too slow", "no answer in 3 s")
    (lost,), _ = attempt(tokenizer, [failed], agent, params={"how": "fine"})
    assert lost.reason == "engine too slow" and lost.detail.startswith(
        "no answer in 3 s (InternalServerError: Error code: 503"
    )


def test_a_request_that_is_given_up_leaves_no_turn(tokenizer: Tokenizer) -> None:
    """OpenAI's client asks again after a time-out: only the answer that it got counts."""
    context, engine = context_of(tokenizer, ["late", "in time"])
    honest, first = engine.generate, [True]

    async def generate(*args: Any, **options: Any) -> Any:
        if first.pop() if first else False:
            await asyncio.sleep(30)
        return await honest(*args, **options)

    engine.generate = generate  # type: ignore[method-assign]
    engine.lines = ["in time"]

    async def agent(base_url: str, api_key: str, prompt: Prompt) -> float:
        async with client_of(base_url, api_key, max_retries=1) as client:
            await client.chat.completions.create(model="policy", messages=[user("?")], timeout=0.5)  # type: ignore
        return 1.0

    (sample,) = asyncio.run(agent_rollout(QUESTION, [1], context, agent=agent))
    assert isinstance(sample, Sample) and sample.text == "in time" and sample.metadata["branches"] == 1


def test_it_attaches_from_a_recipe_and_wrong_agents_are_refused() -> None:
    params = {"agent": "test_rollout_agents:tool_agent", "params": {"stream": True}}
    bind(agent_rollout, params, "hooks.generate", GenerateFn)
    load_agent("test_rollout_agents:tool_agent", {"stream": True})
    with pytest.raises(InputError, match=r"must be callable as Agent\(base_url, api_key, prompt, depth\)"):
        load_agent("test_rollout_agents:tool_agent", {"depth": 3})
    with pytest.raises(InputError, match="Agent must be `async def`"):
        load_agent(lambda base_url, api_key, prompt: 1.0, {})  # type: ignore[arg-type, return-value]


class LearningEngine:
    """The tiny policy: the next token depends on the one before, by a table of logits."""

    def __init__(self, engine: Any):
        self.engine, self.logits = engine, engine.logits

    def learn(self, group: Group) -> None:
        """One step of policy gradient on what the batch says is trained, and on nothing else."""
        spread = group.rewards.std() + np.float32(1e-6)
        batch = make_batch([group], (group.rewards - group.rewards.mean()) / spread)
        gradient = np.zeros_like(self.logits)
        for at in np.flatnonzero(batch.loss_mask):
            before, token = batch.tokens[at - 1], batch.tokens[at]
            probabilities = np.exp(self.logits[before] - np.logaddexp.reduce(self.logits[before]))
            np.testing.assert_allclose(np.log(probabilities[token]), batch.rollout_logprobs[at], atol=1e-4)
            weight = batch.loss_weights[at] * batch.advantages[at]
            gradient[before] += weight * (np.eye(16, dtype=np.float32)[token] - probabilities)
        self.logits += 12.0 * gradient


async def digits_agent(base_url: str, api_key: str, prompt: Prompt) -> float:
    """Two turns; the second should begin with a seven."""
    client = CLIENT.copy(base_url=base_url, api_key=api_key)  # a client of its own takes ten milliseconds to make
    messages: list[Any] = [user(str(prompt.content))]
    for _ in range(2):
        reply = await client.chat.completions.create(model="policy", messages=messages, max_tokens=4)
        messages += [{"role": "assistant", "content": reply.choices[0].message.content}, user("2=")]
    return float(messages[-2]["content"].startswith("7"))


CLIENT = client_of("http://127.0.0.1", "", max_retries=0)


def test_an_agent_of_openais_client_alone_trains(numpy_engine: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Rollouts through the endpoint, advantages, a policy gradient: the reward rises from chance to nearly always."""
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ 'b' if m.role == 'assistant' else 'a' }}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}b{% endif %}"
    )
    policy = LearningEngine(numpy_engine)
    context = GenerateContext(numpy_engine, Tokenizer(str(tmp_path)), SamplingParams(4, stop_token_ids=(13,)), 0)

    async def step(number: int) -> Group:
        seeds = range(number * 64, number * 64 + 32)
        made = await agent_rollout(QUESTION_1, seeds, context, agent=digits_agent)
        return Group(QUESTION_1, tuple(sample for sample in made if isinstance(sample, Sample)))

    async def train() -> list[float]:
        rewards: list[float] = []
        for number in range(12):
            group = await step(number)
            assert len(group.samples) == 32
            rewards.append(float(group.rewards.mean()))
            policy.learn(group)
        await CLIENT.close()
        return rewards

    rewards = asyncio.run(train())
    assert np.mean(rewards[:2]) < 0.4 and np.mean(rewards[-2:]) > 0.8, rewards


QUESTION_1 = Prompt("digits", "1=")
