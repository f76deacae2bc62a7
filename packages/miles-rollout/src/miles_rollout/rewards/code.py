"""Code that a model wrote, run against tests in a sandbox."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from miles_core.errors import InputError
from miles_core.types import Prompt, Sample
from miles_rollout.rewards.metadata import structure
from miles_rollout.sandbox import Limits, Sandbox, choose_sandbox

_BLOCK = regex.compile(r"```(\w*)[^\n]*\n(.*?)```", regex.DOTALL)
_LANGUAGES = ("python", "python3", "py", "")

# Runs a test after the response's code in one module's namespace, and says so with a word that the code was not given.
_HARNESS = """\
import sys

def main(word, say=sys.stderr.write):
    names = {"__name__": "solution"}
    for file in ("solution.py", "test.py"):
        with open(file) as text:
            exec(compile(text.read(), file, "exec"), names)
    say("\\n" + word)

main(sys.stdin.readline())
"""


async def code_tests(
    prompt: Prompt,
    sample: Sample,
    *,
    tests: str = "tests",
    timeout_s: float = 5.0,
    memory_bytes: int = 512 << 20,
    sandbox: str = "local",
    allow_untrusted_exec: bool = False,
) -> dict[str, float]:
    """Share of the tests that the response's Python passes. The part "all" is 1 if it passes every one.

    The code is the last fenced Python block, or all of the text without one. Each test runs in a sandbox of its own:

    - {"input": text, "output": text}: the code as a program; its stdout must be the output, line by line, blanks at
      their ends apart. The program never sees the output.
    - "assert f(2) == 4": Python that runs after the code in its names, and must not raise. Code that looks for it can
      deceive such a test: they share a process.

    {"inputs": [...], "outputs": [...]}, as APPS has it, is a list of the former. A program that runs into a limit fails
    that test. `reward.timeout_s` must be above the tests' number times `timeout_s`.

    Args:
        prompt: its metadata holds the tests, or JSON text of them.
        sample: judged by its text.
        tests: key of the metadata.
        timeout_s: seconds for each test.
        memory_bytes: for each test.
        sandbox: "local", or "package.module:name" (see miles_rollout.sandbox.choose_sandbox).
        allow_untrusted_exec: where this host denies namespaces, run the code without a sandbox.

    Raises:
        SandboxUnavailable: denied, and not allowed to do without.
        InputError: no tests, or of another form.
    """
    cases = _cases(structure(prompt, tests), prompt.id)
    box = await choose_sandbox(sandbox, allow_untrusted_exec)
    limits = Limits(timeout_s=timeout_s, memory_bytes=memory_bytes)
    code = _code(sample.text)
    passed = 0
    for case in cases:
        run = _asserts(box, code, case, limits) if isinstance(case, str) else _prints(box, code, case, limits)
        passed += await run
    return {"reward": passed / len(cases), "all": float(passed == len(cases))}


async def _prepare(*, sandbox: str = "local", allow_untrusted_exec: bool = False, **_: Any) -> None:
    await choose_sandbox(sandbox, allow_untrusted_exec)


code_tests.prepare = _prepare  # pyright: ignore[reportFunctionMemberAccess]  see miles_rollout.rewards.judge.prepare


async def _prints(box: Sandbox, code: str, case: tuple[str, str], limits: Limits) -> bool:
    given, wanted = case
    result = await box.run({"main.py": code}, ["python3", "-I", "main.py"], given, limits)
    return result.ok and _lines(result.stdout.decode(errors="replace")) == _lines(wanted)


async def _asserts(box: Sandbox, code: str, test: str, limits: Limits) -> bool:
    word = secrets.token_hex(16)
    files = {"solution.py": code, "test.py": test, "harness.py": _HARNESS}
    result = await box.run(files, ["python3", "-I", "harness.py"], word + "\n", limits)
    return result.ok and result.stderr.decode(errors="replace").splitlines()[-1:] == [word]


def _cases(value: Any, prompt_id: str) -> list[str | tuple[str, str]]:
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= set(value):
        return list(zip(map(str, value["inputs"]), map(str, value["outputs"]), strict=True))
    cases: list[str | tuple[str, str]] = []
    for item in value if isinstance(value, Sequence) else []:
        if isinstance(item, str):
            cases.append(item)
        elif isinstance(item, Mapping) and {"input", "output"} <= set(item):
            cases.append((str(item["input"]), str(item["output"])))
    if not cases or len(cases) != len(value):
        raise InputError(
            "hooks.reward",
            value,
            f"the tests of prompt {prompt_id!r} must be a list of Python texts or of tables with input and output",
            "Mend or remove that row.",
        )
    return cases


def _code(text: str) -> str:
    blocks = [code for language, code in _BLOCK.findall(text) if language.lower() in _LANGUAGES]
    return blocks[-1] if blocks else text


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
