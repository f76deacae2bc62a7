"""`miles hooks`: everything that it names is there, and every file that it prints works as it is."""

import ast
import asyncio
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from miles_core import Group, HookSpec, InputError, Prompt, Sample, StepReport, VersionSpan, check_recipe
from miles_core.algorithms import AdvantageInputs
from miles_core.algorithms.losses import LossInputs
from miles_core.batching import advantage_inputs, make_batch
from miles_core.config import HooksSection
from miles_launch import hooks
from miles_launch.cli import app
from miles_launch.prepare import optional_hook
from miles_rollout.engine import SamplingParams
from miles_rollout.generate import GenerateContext

torch.set_num_threads(1)


def sample(text: str, reward: float) -> Sample:
    mask = np.array([False, True, True])
    logprobs = np.where(mask, np.float32(-0.5), np.float32(0))
    spans = (VersionSpan(1, 3, 0),)
    return Sample(np.arange(3, dtype=np.int32), mask, logprobs, spans, "stop", text=text, reward=reward)


PROMPT = Prompt("p", "1+1=", {"answer": "2"})
GROUP = Group(PROMPT, (sample("2", 1.0), sample("it is 22", 0.5), sample("no", 0.0)))
INPUTS = advantage_inputs([GROUP])
BATCH = make_batch([GROUP], INPUTS.rewards)
RAW = torch.full((3,), -0.5, dtype=torch.float64)
LOSS_INPUTS = LossInputs(
    RAW.clone().requires_grad_(),
    RAW,
    RAW - 1,
    torch.ones(3),
    torch.tensor([False, True, True]),
    torch.zeros(3, dtype=torch.long),
)


class Engine:
    """Where `single_turn` asks for completions: the generate template is what is tested."""

    async def generate(self, input_ids: Any, sampling: Any, count: int, *, seeds: Any, namespace: str) -> list[Any]:
        raise AssertionError(f"asked for {count} of {input_ids}")


async def make_group(prompt: Prompt, number: int) -> str:
    await asyncio.sleep(0.001 * (3 - number))
    return f"{prompt.id}{number}"


def check_rollout(code: Callable[..., Any], folder: Path) -> None:
    prompts = [Prompt("a", "long"), Prompt("b", "x"), Prompt("c", "xx")]
    assert asyncio.run(code(prompts, make_group)) == ["a0", "b1", "c2"]


def check_generate(code: Callable[..., Any], folder: Path) -> None:
    class Letters:
        def encode(self, content: Any) -> list[str]:
            return list(content)

    context: Any = GenerateContext(Engine(), Letters(), SamplingParams(4), 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError, match=r"asked for 2 of \['T', 'h', 'i', 'n', 'k'"):
        asyncio.run(code(PROMPT, [1, 2], context))


def check_reward(code: Callable[..., Any], folder: Path) -> None:
    assert code(PROMPT, GROUP.samples[0])["right"] == 1
    assert code(PROMPT, GROUP.samples[2])["reward"] < 0


def check_data_source(code: Callable[..., Any], folder: Path) -> None:
    source = code(7)
    assert [prompt.id for prompt in source(3, 2)] == ["sum:3", "sum:4"]
    assert source(4, 1)[0].content == code(7)(3, 2)[1].content != code(8)(3, 2)[1].content


def check_model_source(code: Callable[..., Any], folder: Path) -> None:
    (folder / "theirs").mkdir()
    code.keywords["folder"] = str(folder / "theirs")  # pyright: ignore[reportFunctionMemberAccess]
    code(folder / "mine")
    assert (folder / "mine").is_dir()


def check_after_model_init(code: Callable[..., Any], folder: Path) -> None:
    model = torch.nn.ModuleDict({"embedding": torch.nn.Linear(1, 1), "head": torch.nn.Linear(1, 1)})
    code([model])
    model["head"](model["embedding"](torch.ones(1))).sum().backward()
    frozen, free = (next(model[name].parameters()).grad for name in ("embedding", "head"))
    assert frozen is not None and not frozen.any() and free is not None and free.any()


def check_after_train_step(code: Callable[..., Any], folder: Path) -> None:
    code({"grad_norm": 1.0})
    with pytest.raises(RuntimeError, match="grad_norm = 1000"):
        code({"grad_norm": 1000.0})


def check_loss(code: Callable[..., Any], folder: Path) -> None:
    per_token, metrics = code(LOSS_INPUTS)
    assert per_token.tolist() == [0, 0.5, 0.5] and metrics["weight"].tolist() == [1, 1, 1]


def check_correction(code: Callable[..., Any], folder: Path) -> None:
    assert code(LOSS_INPUTS)[0].tolist() == [1, 0, 0]


def check_kl(code: Callable[..., Any], folder: Path) -> None:
    assert code(RAW, RAW - 1).tolist() == code(RAW.numpy(), RAW.numpy() - 1).tolist() == [0.5] * 3


def check_reduction(code: Callable[..., Any], folder: Path) -> None:
    weights = code(np.array([4, 1, 0], np.int32), np.zeros(3, np.int32))
    assert (weights * [4, 1, 0]).tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def check_after_step(code: Callable[..., Any], folder: Path) -> None:
    code.keywords["path"] = str(folder / "best.txt")  # pyright: ignore[reportFunctionMemberAccess]
    code(StepReport(4, 5, {}), [GROUP])
    assert (folder / "best.txt").read_text() == "4\t1\t'2'\n"


def check_on_checkpoint(code: Callable[..., Any], folder: Path) -> None:
    code.keywords["file"] = str(folder / "list.txt")  # pyright: ignore[reportFunctionMemberAccess]
    code(4, Path("step=4"))
    assert (folder / "list.txt").read_text() == "4\tstep=4\n"


def expect(wanted: Any, *arguments: Any) -> Callable[[Callable[..., Any], Path], None]:
    def check(code: Callable[..., Any], folder: Path) -> None:
        found = code(*arguments)
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == wanted

    return check


CHECKS: dict[str, Callable[[Callable[..., Any], Path], None]] = {
    "rollout": check_rollout,
    "generate": check_generate,
    "reward": check_reward,
    "group_reward": expect([1, 0, 0.5], PROMPT, GROUP.samples),
    "filter_before_reward": expect(None, GROUP),
    "sample_filter": expect(None, GROUP),
    "advantage": expect([0.5, 0, -0.5], INPUTS),
    "reduction": check_reduction,
    "loss": check_loss,
    "correction": check_correction,
    "kl": check_kl,
    "data_source": check_data_source,
    "model_source": check_model_source,
    "after_model_init": check_after_model_init,
    "before_logprobs": expect(None, BATCH),
    "before_train_step": expect(None, BATCH),
    "after_train_step": check_after_train_step,
    "metrics": expect({"mine/words": 5 / 3}, [GROUP]),
    "after_step": check_after_step,
    "on_checkpoint": check_on_checkpoint,
}


def recipe_of(text: str) -> dict[str, Any]:
    """What the docstring of a template says to write into a recipe."""
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    indented = re.findall(r"^    (.*)$", docstring, re.MULTILINE)
    return tomllib.loads("\n".join(indented))


def spec_of(kind: str, table: dict[str, Any]) -> HookSpec:
    minimal = {"name": "x", "model": {"path": "m"}, "data": {"prompts": "p"}, "hooks": {"reward": "a:b"}}
    if kind == "group_reward":
        minimal["hooks"] = {}
    if kind == "data_source":
        minimal["data"] = {}
    merged = {key: {**minimal.get(key, {}), **value} for key, value in table.items()}
    value: Any = check_recipe({**minimal, **merged}, "the template")
    for key in hooks.POINTS[kind].setting.split("."):
        value = getattr(value, key)
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("kind", hooks.POINTS)
def test_a_template_loads_and_runs_as_the_recipe_in_it_says(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = CliRunner().invoke(app, ["hooks", "--new", kind])
    assert done.exit_code == 0 and f"Save as my_{kind}.py" in done.output
    (tmp_path / f"my_{kind}.py").write_text(done.output)
    monkeypatch.syspath_prepend(tmp_path)
    spec = spec_of(kind, recipe_of(done.output))
    assert spec.name.startswith(f"my_{kind}:")
    CHECKS[kind](hooks.POINTS[kind].load(spec), tmp_path)


@pytest.mark.parametrize("kind", hooks.POINTS)
def test_everything_that_is_built_in_loads(kind: str):
    point = hooks.POINTS[kind]
    params: dict[str, dict[str, Any]] = {
        "constant_length": {"length": 3},
        "http_server": {"url": "http://127.0.0.1:1"},
        "sglang_model": {"url": "http://127.0.0.1:1"},
    }
    for name in point.built_in:
        if kind != "reward" or name in {"exact_match", "position_match", "last_integer"}:  # the rest: rollout's tests
            assert callable(point.load(HookSpec(name=name, params=params.get(name, {}))))


def test_the_list_names_every_point_with_its_key_and_signature():
    done = CliRunner().invoke(app, ["hooks"])
    assert done.exit_code == 0
    for kind, point in hooks.POINTS.items():
        assert f"\n{kind}\n    recipe key  {point.setting}\n" in done.output
    assert "Reward(prompt: Prompt, sample: Sample) -> float" in done.output
    assert "async Generate(prompt: Prompt, seeds: Sequence[int], context: Any)" in done.output
    assert "model_family\n    recipe key  model.family" in done.output


def test_one_point_is_told_with_its_arguments_and_what_is_built_in():
    told = hooks.describe("loss")
    assert "PPOClip(clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = None)\n" in told
    assert "ref_logprobs: the same tokens under a frozen reference" in told
    told = hooks.describe("advantage")
    assert "gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 0.95, normalize: bool = True)" in told
    assert get_type_hints(hooks.POINTS["advantage"].protocol.__call__)["inputs"] is AdvantageInputs
    assert "spec: Spec" in hooks.describe("model_family")


@pytest.mark.parametrize("arguments", [["hooks", "rewards"], ["hooks", "--new", "rewards"]])
def test_a_point_that_there_is_not_is_refused(arguments: list[str]):
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError)
    assert "There are: rollout, generate, group_reward" in str(done.exception)


def test_every_hook_of_the_recipe_is_a_point():
    settings = {point.setting for point in hooks.POINTS.values()}
    assert {f"hooks.{name}" for name in HooksSection.model_fields} <= settings


def test_what_the_recipe_names_is_loaded_by_its_point():
    assert optional_hook(HooksSection(reward=HookSpec(name="exact_match")), "after_step") is None
    kept = optional_hook(
        HooksSection(reward=HookSpec(name="exact_match"), sample_filter=HookSpec(name="zero_variance")), "sample_filter"
    )
    assert kept is not None and kept(GROUP) is None
    with pytest.raises(InputError, match=r"hooks\.sample_filter = 'zero_varianze'.*Did you mean 'zero_variance'"):
        optional_hook(
            HooksSection(reward=HookSpec(name="a:b"), sample_filter=HookSpec(name="zero_varianze")), "sample_filter"
        )


@pytest.mark.long
def test_the_template_of_a_family_is_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from miles_train.megatron.families import load_family  # noqa: PLC0415 (imports Megatron)

    (tmp_path / "my_model_family.py").write_text(hooks.template("model_family"))
    monkeypatch.syspath_prepend(tmp_path)
    assert load_family(recipe_of(hooks.template("model_family"))["model"]["family"]).with_more is None
