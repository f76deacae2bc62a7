import functools
import inspect
from pathlib import Path
from typing import Any

import pytest

from miles_core import HookSpec, InputError
from miles_core.hooks import DataSource, Reward, SampleFilter, bind, load_hook, load_object


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of user code; its name."""
    name = f"user_code_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        "def score(prompt, sample, weight=1.0):\n    return weight\n"
        "async def judge(prompt, sample):\n    return 1.0\n"
        "def lonely(prompt):\n    return 1.0\n"
        "class Box:\n    @staticmethod\n    def inner(prompt, sample):\n        return 3.0\n"
        "class Scorer:\n    def __call__(self, prompt, sample):\n        return 4.0\n"
        "scorer = Scorer()\n"
        "CONSTANT = 3\n"
    )
    (tmp_path / "broken_user_code.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def load(name: str, protocol: type = Reward, **params: Any) -> Any:
    return load_hook(HookSpec(name=name, params=params), "hooks.reward", protocol)


def test_code_is_found_by_its_name_and_called_with_its_parameters(user_module: str):
    assert load(f"{user_module}:score")("prompt", "sample") == 1.0
    assert load(f"{user_module}:score", weight=2.5)("prompt", "sample") == 2.5


def test_attributes_of_attributes_and_callable_objects_are_code_too(user_module: str):
    assert load(f"{user_module}:Box.inner")("prompt", "sample") == 3.0
    assert load(f"{user_module}:scorer")("prompt", "sample") == 4.0


def test_async_code_stays_async_with_parameters_bound(user_module: str):
    assert inspect.iscoroutinefunction(load(f"{user_module}:judge"))


@pytest.mark.parametrize("name", ["nocolon", ":attribute", "module:", ""])
def test_a_name_without_module_or_attribute_is_refused(name: str):
    with pytest.raises(InputError, match=r'code is named "package\.module:name"'):
        load_object(name, "hooks.reward")


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(InputError, match=r"hooks\.reward = 'no_such_module:f'.*ModuleNotFoundError"):
        load_object("no_such_module:f", "hooks.reward")


def test_a_module_that_cannot_be_read_is_refused(user_module: str):
    with pytest.raises(InputError, match="SyntaxError"):
        load_object("broken_user_code:f", "hooks.reward")


def test_a_missing_attribute_is_refused_and_the_others_named(user_module: str):
    with pytest.raises(InputError, match=r"It has: .*lonely, score"):
        load(f"{user_module}:scroe")


def test_what_cannot_be_called_is_refused(user_module: str):
    with pytest.raises(InputError, match=r"must be callable as Reward\(prompt, sample\)"):
        load(f"{user_module}:CONSTANT")


def test_too_few_arguments_are_refused_with_the_signature_expected(user_module: str):
    with pytest.raises(InputError, match=r"\(prompt\).*must be callable as Reward\(prompt, sample\)"):
        load(f"{user_module}:lonely")


def test_an_unknown_parameter_is_refused(user_module: str):
    with pytest.raises(InputError, match="wieght"):
        load(f"{user_module}:score", wieght=1)


def test_a_parameter_cannot_take_the_place_of_an_argument(user_module: str):
    with pytest.raises(InputError, match="multiple values"):
        load(f"{user_module}:score", prompt=1)


def test_a_parameter_that_is_required_must_be_given():
    def source(start: int, count: int, *, field: str) -> list[Any]:
        return [field] * count

    with pytest.raises(InputError, match="field"):
        bind(source, {}, "data.source", DataSource)
    assert bind(source, {"field": "x"}, "data.source", DataSource)(0, 2) == ["x", "x"]


def test_arguments_may_be_named_as_one_likes():
    code = functools.partial(lambda one, two, three: (one, two, three), three=3)
    assert bind(code, {}, "x", Reward)(1, 2) == (1, 2, 3)
    assert bind(lambda *args: len(args), {}, "x", SampleFilter)("group") == 1


def test_code_without_a_signature_is_taken_at_its_word():
    assert bind(min, {}, "x", Reward)(1, 2) == 1
