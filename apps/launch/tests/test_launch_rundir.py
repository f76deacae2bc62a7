"""Folders of runs: never overwritten, found again, and resumed only by their own recipe."""

import json
from pathlib import Path
from typing import Any

import pytest

from miles_core import InputError, Recipe, check_recipe, load_recipe
from miles_launch.rundir import find_run, new_run


def recipe(**changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "job",
        "model": {"path": "m"},
        "data": {"source": {"name": "miles_core.tasks:copy_digits", "digits": 4}},
        "hooks": {"reward": "position_match"},
        "train": {"steps": 5, "megatron": {"lr": 1e-3}},
    }
    return check_recipe(table | changes, "test")


def test_a_run_gets_a_folder_of_its_own_and_its_resolved_recipe_can_be_run_again(tmp_path: Path):
    first, second, other = (new_run(tmp_path, r) for r in (recipe(), recipe(), recipe(name="job-long")))
    assert [run.path.name for run in (first, second, other)] == ["job", "job-2", "job-long"]
    assert load_recipe(first.recipe) == recipe()
    assert json.loads((first.path / "versions.json").read_text())["miles-core"]


def test_the_newest_run_of_the_name_is_resumed(tmp_path: Path):
    for _ in range(3):
        new_run(tmp_path, recipe())
    assert find_run(tmp_path, recipe()).path.name == "job-3"
    with pytest.raises(InputError, match="there is no such run"):
        find_run(tmp_path, recipe(name="other"))


def test_what_decides_the_computation_cannot_change_on_resume(tmp_path: Path):
    new_run(tmp_path, recipe())
    longer = recipe(train={"steps": 50, "save_every": 7, "megatron": {"lr": 1e-3}}, observe={"samples_every": 1})
    assert find_run(tmp_path, longer).path.name == "job"
    with pytest.raises(InputError, match=r"train\.megatron\.lr = 0\.002: the run in .*job has 0\.001"):
        find_run(tmp_path, recipe(train={"steps": 5, "megatron": {"lr": 2e-3}}))
    with pytest.raises(InputError, match=r"seed = 1"):
        find_run(tmp_path, recipe(seed=1))
    with pytest.raises(InputError, match=r"data\.source\.digits"):
        find_run(tmp_path, recipe(data={"source": {"name": "miles_core.tasks:copy_digits", "digits": 3}}))


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        new_run(tmp_path / "file", recipe())
