import functools
import inspect
from pathlib import Path
from typing import Any

import pytest

from miles_core import HookSpec, InputError
from miles_core.algorithms import needs, needs_of
from miles_core.hooks import (
    POINTS,
    DataSource,
    Generate,
    MakesDataSource,
    Reward,
    SampleFilter,
    bind,
    load_hook,
    load_object,
    point_of,
)


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


class Weighed:
    def __init__(self, weight: float = 1.0):
        if weight < 0:
            raise ValueError(f"weight={weight} must not be negative")
        self.weight = weight

    def __call__(self, prompt: Any, sample: Any) -> float:
        return self.weight


class Counting:
    def __init__(self, seed: int, step: int = 1):
        self.seed, self.step = seed, step

    def __call__(self, start: int, count: int) -> list[Any]:
        return [self.seed + self.step * number for number in range(start, start + count)]


def test_the_parameters_of_a_class_make_the_object_that_is_called():
    assert bind(Weighed, {"weight": 2.0}, "x", Reward)("prompt", "sample") == 2.0
    with pytest.raises(InputError, match=r"Weighed\(weight: float = 1\.0\) cannot be made.*unexpected keyword"):
        bind(Weighed, {"wieght": 2.0}, "x", Reward)
    with pytest.raises(InputError, match="must not be negative"):
        bind(Weighed, {"weight": -1.0}, "x", Reward)
    with pytest.raises(InputError, match=r"must be callable as SampleFilter\(group\)"):
        bind(Weighed, {}, "x", SampleFilter)


def test_what_makes_objects_may_be_their_class():
    source = bind(Counting, {"step": 2}, "data.source", MakesDataSource)(10)
    assert source(0, 3) == [10, 12, 14]


def test_async_where_it_must_be_and_nowhere_else():
    async def wait(group: Any) -> None: ...
    async def make(prompt: Any, seeds: Any, context: Any) -> list[Any]:
        return []

    def make_now(prompt: Any, seeds: Any, context: Any) -> list[Any]:
        return []

    with pytest.raises(InputError, match="must be a plain function: nobody would await it"):
        bind(wait, {}, "hooks.sample_filter", SampleFilter)
    with pytest.raises(InputError, match="must be `async def`"):
        bind(make_now, {}, "hooks.generate", Generate)
    assert bind(make, {}, "hooks.generate", Generate) is make
    assert bind(make, {}, "hooks.rollout", Generate)(1, 2, 3).close() is None


def test_bound_parameters_do_not_hide_what_code_needs():
    def estimate(prompt: Any, sample: Any, *, weight: float = 1.0) -> float:
        return weight

    bound = bind(needs("values")(estimate), {"weight": 2.0}, "x", Reward)
    assert needs_of(bound) == {"values"} and bound(1, 2) == 2.0


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages with entry points, as an installer leaves them."""
    for package, names in (("one", ("mine", "shared")), ("two", ("shared",))):
        (tmp_path / f"user_{package}.py").write_text("def score(prompt, sample, weight=1.0):\n    return weight\n")
        info = tmp_path / f"user_{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: user-{package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = user_{package}:score\n" for name in names)
        (info / "entry_points.txt").write_text(f"[miles.hooks]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_installed_packages_give_short_names():
    assert load("mine", weight=3.0)("prompt", "sample") == 3.0
    with pytest.raises(InputError, match=r"several installed packages have it: user_one:score, user_two:score"):
        load("shared")
    with pytest.raises(InputError, match=r"Did you mean 'mine'"):
        load("mime")


def test_a_short_name_that_nothing_has_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"algorithm\.loss = 'ppo_clop'.*Did you mean 'ppo_clip'"):
        POINTS["loss"].load(HookSpec(name="ppo_clop"))
    with pytest.raises(InputError, match=r"There are: rollout, generate"):
        point_of("los")


@pytest.mark.parametrize("kind", POINTS)
def test_every_point_has_a_protocol_with_a_documented_call(kind: str):
    protocol = POINTS[kind].protocol
    assert inspect.getdoc(protocol) and inspect.getdoc(protocol.__call__)
    for name in POINTS[kind].built_in.values():
        assert inspect.getdoc(load_object(name, kind))


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("advantage", "def f(rewards, groups): ...", r"Advantage\(inputs\)"),
        ("loss", "class f:\n    def __call__(self, logprobs, advantages): ...", r"Loss\(inputs\)"),
        ("correction", "f = 3", r"Correction\(inputs\)"),
        ("kl", "def f(logprobs): ...", r"KLEstimator\(logprobs, ref_logprobs\)"),
        ("reduction", "def f(lengths): ...", r"Reduction\(num_tokens, group_index\)"),
        ("group_reward", "def f(prompt): ...", r"GroupReward\(prompt, samples\)"),
        ("rollout", "async def f(prompts): ...", r"Rollout\(prompts, make_group\)"),
        ("after_step", "def f(report): ...", r"AfterStep\(report, groups\)"),
    ],
)
def test_a_wrong_signature_is_told_with_the_right_one(
    kind: str, code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = f"wrong_{kind}_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"{POINTS[kind].setting} \({module}:f\).*must be callable as {expected}"):
        POINTS[kind].load(HookSpec(name=f"{module}:f"))
