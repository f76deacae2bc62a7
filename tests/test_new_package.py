"""tools/new_package.py, run in a copy of the root."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """The root's own files and the members' pyproject files: what uv needs to see a workspace."""
    own = [root / name for name in ("pyproject.toml", "CODEOWNERS", ".python-version", "tools/new_package.py")]
    for file in [*own, *root.glob("*/*/pyproject.toml")]:
        target = tmp_path / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return tmp_path


def new_package(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, copy / "tools" / "new_package.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_new_room_is_whole(copy: Path, uv: Callable[..., str]):
    done = new_package(copy, "eval", "Scoring checkpoints on held-out tasks.")
    assert done.returncode == 0, done.stderr
    assert "tools/lock.py update" in done.stdout
    room = copy / "packages" / "miles-eval"

    uv("build", "--wheel", "--out-dir", copy / "dist", room, cwd=copy)
    (wheel,) = (copy / "dist").glob("*.whl")
    assert {"miles_eval/__init__.py", "miles_eval/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())

    for command in (["ruff", "check"], ["ruff", "format", "--check"], ["pytest", "-q", "-p", "no:cacheprovider"]):
        done = subprocess.run(
            [sys.executable, "-m", *command, "packages/miles-eval"],
            cwd=copy, env={"PYTHONPATH": str(room / "src")}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout

    example = (room / "README.md").read_text().split("```python\n")[1].split("```")[0]
    path = {"PYTHONPATH": str(room / "src")}
    done = subprocess.run([sys.executable, "-c", example], env=path, capture_output=True, text=True, check=True)
    assert done.stdout == "Scoring checkpoints on held-out tasks.\n"


def test_the_root_knows_the_new_room(copy: Path):
    new_package(copy, "eval", "Scoring checkpoints on held-out tasks")
    tool = tomllib.loads((copy / "pyproject.toml").read_text())["tool"]
    assert tool["uv"]["sources"]["miles-eval"] == {"workspace": True}
    assert "miles_eval" in tool["importlinter"]["root_packages"]
    for contract in tool["importlinter"]["contracts"]:
        if set(contract.get("forbidden_modules", ())) & {"ray", "sglang", "megatron"}:
            assert "miles_eval" in contract["source_modules"], contract["name"]
    assert "\n/packages/miles-eval/       @miles/eval\n" in (copy / "CODEOWNERS").read_text()


@pytest.mark.parametrize("noun", ["core", "Eval", "two words", "a-b", ""])
def test_a_noun_that_cannot_be_changes_nothing(copy: Path, noun: str):
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    done = new_package(copy, noun, "Anything")
    assert done.returncode == 2
    assert before == {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
