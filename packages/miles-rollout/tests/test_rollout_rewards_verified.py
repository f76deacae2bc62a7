"""Rewards that parse, prove or run what the model wrote."""

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from miles_core.config import HookSpec, RewardSection
from miles_core.errors import InputError
from miles_core.types import Prompt, Sample
from miles_rollout.rewards import make_judge, regex_match
from miles_rollout.rewards.code import code_tests
from miles_rollout.rewards.schema import json_schema
from miles_rollout.rewards.tools import tool_calls
from miles_rollout.sandbox import LocalSandbox, SandboxUnavailable, choose_sandbox


def prompt(**metadata: Any) -> Prompt:
    return Prompt("p1", "?", metadata)


def sample(text: str) -> Sample:
    tokens = np.zeros(2, np.int32)
    return Sample(tokens, tokens == 0, tokens.astype(np.float32), (), "stop", text)


def judged(reward: str, text: str, metadata: Mapping[str, Any], **params: Any) -> float:
    async def run() -> float:
        judge = make_judge(HookSpec(name=reward, params=params), RewardSection(timeout_s=60.0))  # pyright: ignore
        try:
            await judge.start()
            (verdict,) = await judge.judge(prompt(**metadata), [sample(text)])
        finally:
            await judge.close()
        assert not verdict.failure, verdict
        return verdict.reward

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("pattern", "text", "reward"),
    [
        (r"Answer: (\d+)", "Answer: 3\nAnswer: 7 ", 1.0),
        (r"Answer: (\d+)", "Answer: 7\nAnswer: 3", 0.0),
        (r"Answer: (\d+)", "7", 0.0),
        (r"<a>(.*)</a>", "<a>\n 7 \n</a>", 1.0),
        (r"<think>.*</think>", "<think>\nhm\n</think> 5", 1.0),
        (r"<think>.*</think>", "5", 0.0),
    ],
)
def test_regex_match(pattern: str, text: str, reward: float) -> None:
    assert regex_match(prompt(answer=7), sample(text), pattern=pattern) == reward


def test_a_pattern_that_backtracks_without_end_is_given_up() -> None:
    with pytest.raises(TimeoutError):
        regex_match(prompt(answer=7), sample("ab" * 40 + "!"), pattern=r"^(?:(a|ab|b)+)+$", timeout_s=0.2)


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("1/2", "so it is \\boxed{0.5}", 1.0),
        ("\\frac{1}{2}", "it is $\\frac{2}{4}$", 1.0),
        ("$x = 2$", "\\boxed{2}", 1.0),
        (42, "first 41, then the answer is 42", 1.0),
        ("42", "43", 0.0),
        ("(1, 2)", "\\boxed{(2, 1)}", 0.0),
        ("x^2 - 1", "$(x-1)(x+1)$", 1.0),
        ("7", "no idea", 0.0),
    ],
)
def test_math_equal(answer: object, text: str, reward: float) -> None:
    mathematics = pytest.importorskip("miles_rollout.rewards.mathematics", reason="needs math-verify")
    assert mathematics.math_equal(prompt(answer=answer), sample(text)) == reward


def test_mathematics_is_judged_in_the_pool() -> None:
    pytest.importorskip("math_verify", reason="needs math-verify")
    assert judged("math_equal", "\\boxed{0.5}", {"answer": "1/2"}) == 1.0


SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "reward", "is_json"),
    [
        ('{"a": 1}', 1.0, 1.0),
        ('Here:\n```json\n{"a": 1}\n```\n', 1.0, 1.0),
        ('{"a": "1"}', 0.0, 1.0),
        ('{"a": 1, "b": 2}', 0.0, 1.0),
        ('{"a": NaN}', 0.0, 0.0),
        ('the object {"a": 1}', 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_json_schema(text: str, reward: float, is_json: float) -> None:
    assert json_schema(prompt(schema=json.dumps(SCHEMA)), sample(text)) == {"reward": reward, "json": is_json}
    assert json_schema(prompt(), sample(text), schema=SCHEMA)["reward"] == reward


def test_a_schema_that_is_none_or_points_elsewhere_is_the_users_mistake() -> None:
    with pytest.raises(InputError, match="no JSON schema"):
        json_schema(prompt(schema={"type": "thing"}), sample("{}"))
    with pytest.raises(InputError, match=r"http://localhost/x.*not fetched"):
        json_schema(prompt(schema={"$ref": "http://localhost/x"}), sample("{}"))
    with pytest.raises(InputError, match=r"no such key.*'answer'"):
        json_schema(prompt(answer=1), sample("{}"))


WEATHER = {"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}
TIME = {"name": "time", "arguments": "{}"}


def call(value: object) -> str:
    return f"<tool_call>\n{json.dumps(value)}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "reward", "names", "is_json"),
    [
        (call({"arguments": {"days": [1, 2], "city": "Oslo"}, "name": "weather"}) + call({"name": "time"}), 1, 1, 1),
        (call(TIME) + "and" + call(WEATHER), 1, 1, 1),
        (call(WEATHER), 0.5, 0.5, 1),
        (call(WEATHER) * 4, 0.25, 0.25, 1),
        (call({"name": "weather", "arguments": {}}) + call(TIME), 0.5, 1, 1),
        (call(WEATHER) + "<tool_call>time()</tool_call>", 0.5, 0.5, 0),
        (call(["weather"]) + call({"arguments": {}}), 0, 0, 0),
        ("none", 0, 0, 1),
    ],
)
def test_tool_calls(text: str, reward: float, names: float, is_json: float) -> None:
    parts = tool_calls(prompt(tool_calls=[WEATHER, TIME]), sample(text))
    assert parts == {"reward": reward, "names": names, "json": is_json}


def test_no_tool_wanted_and_none_called() -> None:
    assert tool_calls(prompt(tool_calls="[]"), sample("hello"))["reward"] == 1.0
    assert tool_calls(prompt(tool_calls=[]), sample(call(TIME)))["reward"] == 0.0


@pytest.fixture
def a_sandbox() -> None:
    try:
        asyncio.run(choose_sandbox())
    except SandboxUnavailable as error:
        pytest.skip(str(error))


DOUBLE = (
    "Thus:\n```python\ndef f(x):\n    return 2 * x\n\nif __name__ == '__main__':\n    print(f(int(input())))\n```\n"
)


@pytest.mark.usefixtures("a_sandbox")
@pytest.mark.parametrize(
    ("text", "tests", "reward"),
    [
        (DOUBLE, [{"input": "2\n", "output": "4"}, {"input": "3", "output": "6\n"}], 1.0),
        (DOUBLE, {"inputs": ["2", "3"], "outputs": ["4", "7"]}, 0.5),
        (DOUBLE, ["assert f(2) == 4", "assert f(2) == 5", "assert f('a') == 'aa'", "f(1, 2)"], 0.5),
        ("print(1)", json.dumps([{"input": "", "output": "1"}]), 1.0),
        ("```python\nprint(1)\n```\nor\n```python\nprint(2)\n```", [{"input": "", "output": "2"}], 1.0),
        ("while True: pass", [{"input": "", "output": ""}], 0.0),
        ("print(1); exit(1)", [{"input": "", "output": "1"}], 0.0),
        ("import os; os._exit(0)", ["assert False"], 0.0),
        ("def f(x): return 4\nimport atexit, os; atexit.register(os._exit, 0)", ["assert f(1) == 5"], 0.0),
        ("this is no code", ["assert True"], 0.0),
        ("import os\nwhile True: os.fork()", [{"input": "", "output": ""}], 0.0),
        ("while True: print('x' * 99999)", [{"input": "", "output": ""}], 0.0),
    ],
)
def test_code_tests(text: str, tests: object, reward: float) -> None:
    parts = asyncio.run(code_tests(prompt(tests=tests), sample(text), timeout_s=1.0 if "while" in text else 20.0))
    assert parts == {"reward": reward, "all": float(reward == 1.0)}


@pytest.mark.usefixtures("a_sandbox")
def test_code_is_run_from_the_pool() -> None:
    assert judged("code_tests", DOUBLE, {"tests": ["assert f(2) == 4"]}, timeout_s=20.0) == 1.0


@pytest.mark.parametrize("tests", [[], {}, [1], {"inputs": ["1"]}, [{"input": "1"}], "[]"])
def test_tests_of_another_form_are_the_users_mistake(tests: object) -> None:
    with pytest.raises(InputError, match="must be a list of Python texts"):
        asyncio.run(code_tests(prompt(tests=tests), sample(DOUBLE), sandbox="miles_rollout.sandbox:LocalSandbox"))


def test_names_go_to_sandboxes() -> None:
    assert isinstance(asyncio.run(choose_sandbox("miles_rollout.sandbox:LocalSandbox")), LocalSandbox)


@pytest.mark.parametrize(
    ("reward", "library", "extra"),
    [
        ("math_equal", "math_verify", "math"),
        ("json_schema", "jsonschema", "json"),
        ("reasoning_gym", "reasoning_gym", "reasoning-gym"),
        ("verifiers", "verifiers", "verifiers"),
    ],
)
def test_an_extra_that_is_missing_is_named(reward: str, library: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{library!r}] = None\n"
        "from miles_core.config import HookSpec, RewardSection\n"
        "from miles_core.errors import InputError\n"
        "from miles_rollout.rewards import make_judge\n"
        f"try: make_judge(HookSpec(name={reward!r}), RewardSection(isolate=False))\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f'pip install "miles-rollout[{extra}]"' in done.stdout


def test_reasoning_gym_judges_its_own_entries() -> None:
    library = pytest.importorskip("reasoning_gym", reason="needs miles-rollout[reasoning-gym]")
    gym = pytest.importorskip("miles_rollout.rewards.gym")
    item = library.create_dataset("chain_sum", size=1, seed=3)[0]
    right = sample(f"hm <answer>{item['answer']}</answer>")
    assert gym.reasoning_gym(prompt(entry=json.dumps(item)), right) == 1.0
    assert gym.reasoning_gym(prompt(entry=item), sample("<answer>x</answer>")) == 0.0


def test_a_bare_name_that_is_no_built_in_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'math_equal'"):
        make_judge(HookSpec(name="math_equals"), RewardSection())  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("reward", [regex_match, json_schema, tool_calls, code_tests])
def test_built_in_rewards_are_called_as_all_are(reward: Any) -> None:
    first, second, *rest = inspect.signature(reward).parameters.values()
    assert (first.name, second.name) == ("prompt", "sample") and all(p.kind is p.KEYWORD_ONLY for p in rest)
