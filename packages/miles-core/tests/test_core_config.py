import functools
import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from miles_core import InputError, Recipe, check_recipe, load_recipe

MINIMAL = """
name = "tiny"
[model]
path = "model"
[data]
prompts = "prompts.jsonl"
[hooks]
reward = "pkg.rewards:score"
"""


def minimal(**over: Any) -> dict[str, Any]:
    return tomllib.loads(MINIMAL) | over


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.toml", MINIMAL)


def refused(table: dict[str, Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        check_recipe(table, "tiny.toml")
    return caught.value


def test_a_minimal_recipe_has_defaults_for_the_rest(recipe_file: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.hooks.reward.name == "pkg.rewards:score"
    assert recipe.algorithm.advantage.name == "grpo"
    assert recipe.train.num_ranks == 1
    assert recipe.hooks.after_step is None


def test_recipes_are_frozen(recipe_file: Path):
    with pytest.raises(ValidationError):
        load_recipe(recipe_file).name = "other"  # type: ignore[misc]


def test_code_takes_its_parameters_from_the_table_beside_its_name():
    recipe = check_recipe(minimal(hooks={"reward": {"name": "a:b", "weight": 2}}), "x")
    assert (recipe.hooks.reward.name, dict(recipe.hooks.reward.params)) == ("a:b", {"weight": 2})


def test_engine_tables_pass_through_verbatim():
    table = {"megatron": {"lr": 1e-6, "tensor_model_parallel_size": 2, "anything": [1, {"b": 2}]}}
    assert check_recipe(minimal(train=table), "x").train.megatron == table["megatron"]


def test_a_dumped_recipe_reads_back_as_itself(tmp_path: Path):
    hooks = {"reward": {"name": "a:b", "weight": 2}, "after_step": "c:d"}
    recipe = check_recipe(minimal(hooks=hooks, algorithm={"advantage": {"name": "grpo", "normalize_std": False}}), "x")
    dumped = recipe.model_dump(mode="json", exclude_none=True)
    assert dumped["hooks"]["reward"] == hooks["reward"]
    path = write(tmp_path / "resolved.toml", tomli_w.dumps(dumped))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("table", "setting", "hint"),
    [
        (minimal(trian={}), "trian", "'train'"),
        (minimal(train={"stepz": 1}), "train.stepz", "'steps'"),
        (minimal(hooks={"reward": "a:b", "rewrd": "a:b"}), "hooks.rewrd", "'reward'"),
        (minimal(cluster={"zzz": 1}), "cluster.zzz", "Known keys here: address"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(table: dict[str, Any], setting: str, hint: str):
    error = refused(table)
    assert error.setting == setting
    assert "unknown key in tiny.toml" in error.rule
    assert hint in error.way_out


@pytest.mark.parametrize(
    ("table", "setting"),
    [
        ({key: value for key, value in minimal().items() if key != "hooks"}, "hooks"),
        (minimal(hooks={"reward": {"weight": 1}}), "hooks.reward.name"),
        (minimal(model={}), "model.path"),
    ],
)
def test_a_missing_key_is_named(table: dict[str, Any], setting: str):
    error = refused(table)
    assert error.setting == setting and "missing in tiny.toml" in error.rule


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", "12"),
        ("train", "steps", True),
        ("train", "steps", 2.5),
        ("train", "steps", 0),
        ("train", "deadline_s", float("nan")),
        ("train", "deadline_s", float("inf")),
        ("train", "megatron", 3),
        ("data", "shuffle", "yes"),
        ("rollout", "top_p", 1.5),
        ("rollout", "temperature", 0),
        ("algorithm", "reduction", 3),
        ("hooks", "reward", 3),
        ("cluster", "dashboard_port", 70000),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(section: str, key: str, value: Any):
    table = minimal()
    table[section] = table.get(section, {}) | {key: value}
    error = refused(table)
    assert error.setting == f"{section}.{key}"
    assert error.rule and "tiny.toml" in error.way_out


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "a b"])
def test_a_run_name_is_a_folder_name(name: str):
    assert refused(minimal(name=name)).setting == "name"


@pytest.mark.parametrize("hooks", [{}, {"reward": "a:b", "group_reward": "a:c"}])
def test_samples_have_exactly_one_judge(hooks: dict[str, Any]):
    assert "exactly one of hooks.reward" in str(refused(minimal(hooks=hooks)))


def test_the_terms_of_the_loss_are_data():
    kl = {"coef": 0.01, "estimator": "k2", "place": "reward"}
    corrections = ["tis", {"name": "mis", "level": "sequence", "upper": 3}]
    section = check_recipe(minimal(algorithm={"kl": kl, "corrections": corrections}), "x").algorithm
    assert section.kl is not None and section.kl.estimator.name == "k2"
    assert [spec.name for spec in section.corrections] == ["tis", "mis"]
    assert section.corrections[1].params == {"level": "sequence", "upper": 3}
    assert "algorithm.kl.place" in str(refused(minimal(algorithm={"kl": {"coef": 0.1, "place": "nowhere"}})))
    assert "algorithm.kl.coef" in str(refused(minimal(algorithm={"kl": {"coef": 0}})))


def test_code_may_be_an_object_in_python():
    hooks = {"reward": functools.partial(importlib.import_module, package="x"), "after_step": "c:d"}
    recipe = check_recipe(minimal(hooks=hooks), "x")
    assert recipe.hooks.reward is not None
    assert (recipe.hooks.reward.name, recipe.hooks.reward.params) == ("importlib:import_module", {"package": "x"})


@pytest.mark.parametrize("code", [lambda prompt, sample: 0.0, functools.partial(max, 1), minimal().get])
def test_code_that_other_processes_cannot_import_is_refused(code: Any):
    assert "hooks.reward" in str(refused(minimal(hooks={"reward": code})))


@pytest.mark.parametrize("data", [{}, {"prompts": "a.jsonl", "source": "a:b"}])
def test_prompts_have_exactly_one_origin(data: dict[str, Any]):
    assert "exactly one of data.prompts" in str(refused(minimal(data=data)))


def test_a_deterministic_run_has_one_rank():
    error = refused(minimal(deterministic=True, train={"num_ranks": 2}))
    assert "train.num_ranks = 1 (it is 2)" in error.rule
    assert check_recipe(minimal(deterministic=True), "x").deterministic


def test_a_child_overrides_its_parent_key_by_key(tmp_path: Path):
    write(tmp_path / "base.toml", MINIMAL + "[train]\nsteps = 5\nnum_ranks = 2\n[train.megatron]\nlr = 1.0\nseed = 1\n")
    child = write(tmp_path / "child.toml", 'extends = "base.toml"\n[train]\nsteps = 7\n[train.megatron]\nlr = 2.0\n')
    train = load_recipe(child).train
    assert (train.steps, train.num_ranks, train.megatron) == (7, 2, {"lr": 2.0, "seed": 1})


def test_a_parent_is_found_from_the_childs_own_folder(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "base.toml", MINIMAL)
    write(tmp_path / "deep" / "middle.toml", 'extends = "../base.toml"\nseed = 3\n')
    child = write(tmp_path / "child.toml", 'extends = "deep/middle.toml"\nname = "child"\n')
    recipe = load_recipe(child)
    assert (recipe.name, recipe.seed, recipe.model.path) == ("child", 3, "model")


@pytest.mark.parametrize(
    ("child", "params"),
    [
        ('reward = { name = "a:b", k = 2 }', {"j": 1, "k": 2}),
        ('reward = { name = "a:c", k = 2 }', {"k": 2}),
        ('reward = "a:c"', {}),
    ],
)
def test_parameters_of_code_are_inherited_only_by_the_same_code(tmp_path: Path, child: str, params: dict[str, int]):
    base = MINIMAL.replace('reward = "pkg.rewards:score"', 'reward = { name = "a:b", j = 1 }')
    write(tmp_path / "base.toml", base)
    path = write(tmp_path / "child.toml", f'extends = "base.toml"\n[hooks]\n{child}\n')
    assert load_recipe(path).hooks.reward.params == params


def test_a_recipe_cannot_be_its_own_ancestor(tmp_path: Path):
    write(tmp_path / "a.toml", 'extends = "b.toml"\n')
    write(tmp_path / "b.toml", 'extends = "a.toml"\n')
    with pytest.raises(InputError, match="its own ancestor"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize("text", ["name = ", "extends = 3\n", 'extends = "nowhere.toml"\n'])
def test_an_unreadable_recipe_is_one_error(tmp_path: Path, text: str):
    with pytest.raises(InputError):
        load_recipe(write(tmp_path / "a.toml", text))


def test_a_recipe_that_is_not_there_is_one_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        load_recipe(tmp_path / "nowhere.toml")


def test_a_recipe_that_is_not_text_is_one_error(tmp_path: Path):
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid TOML"):
        load_recipe(tmp_path / "a.toml")


def test_overrides_take_tomls_spelling_and_bare_words(recipe_file: Path):
    overrides = [
        "train.steps=9",
        "train.megatron.lr=2e-6",
        "train.megatron.names=['a', 'b']",
        "sync.transport=gloo",
        "data.shuffle=false",
        "model.path=/a/b=c",
        " rollout.top_p = 0.5",
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.train.steps == 9
    assert recipe.train.megatron == {"lr": 2e-6, "names": ["a", "b"]}
    assert recipe.sync.transport == "gloo"
    assert recipe.data.shuffle is False
    assert recipe.model.path == "/a/b=c"
    assert recipe.rollout.top_p == 0.5


def test_overrides_reach_the_parameters_of_code_named_by_a_bare_word(recipe_file: Path):
    reward = load_recipe(recipe_file, ["hooks.reward.weight=2"]).hooks.reward
    assert (reward.name, reward.params) == ("pkg.rewards:score", {"weight": 2})


def test_the_last_override_wins(recipe_file: Path):
    assert load_recipe(recipe_file, ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3"])
def test_an_override_that_is_none_is_an_error(recipe_file: Path, override: str):
    with pytest.raises(InputError, match=r"--set = "):
        load_recipe(recipe_file, [override])


def test_an_override_cannot_reach_into_a_number(recipe_file: Path):
    with pytest.raises(InputError, match="steps is a value, not a table"):
        load_recipe(recipe_file, ["train.steps=1", "train.steps.deep=1"])


def test_an_override_of_an_unknown_key_is_an_error(recipe_file: Path):
    with pytest.raises(InputError, match=r"train\.stesp = 3: unknown key.*'steps'"):
        load_recipe(recipe_file, ["train.stesp=3"])


def test_every_field_has_a_line_in_its_sections_docstring():
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not hasattr(section, "model_fields") or name == "hooks":
            continue
        for key in section.model_fields:
            assert f"{key}:" in section.__doc__, f"[{name}] {key} is not described"
