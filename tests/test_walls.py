"""The walls of the house: what each import brings along, and that the contracts would notice a breach."""

import importlib
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENGINES = ("ray", "sglang", "megatron", "transformer_engine")

# A line in a module that has no business with it, and the contract that it breaks.
BREACHES = [
    ("miles_core/queue.py", "import ray", "Ray is imported only in miles_core.cluster"),
    ("miles_rollout/worker.py", "import ray", "Ray is imported only in miles_core.cluster"),
    ("miles_rollout/worker.py", "import sglang", "SGLang is imported only where the address says so"),
    ("miles_sync/buckets.py", "from sglang.srt import utils", "SGLang is imported only where the address says so"),
    ("miles_launch/__init__.py", "import megatron.core", "Megatron and Transformer Engine are imported only"),
    ("miles_train/trainer.py", "import transformer_engine", "Megatron and Transformer Engine are imported only"),
    ("miles_core/batching.py", "import torch", "In core only losses, their corrections and KL know torch"),
    ("miles_core/types.py", "import miles_train.trainer", "Apps compose rooms"),
    ("miles_train/trainer.py", "import miles_rollout", "Apps compose rooms"),
    ("miles_core/types.py", "import miles_launch", "Apps compose rooms"),
    ("miles_sync/buckets.py", "import miles_core", "Sync, precision and lora know nobody"),
    ("miles_lora/layer.py", "import miles_precision", "Sync, precision and lora do not know each other"),
    ("miles_train/trainer.py", "import miles_lora", "Only apps know sync, precision and lora"),
]


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_door_of_core_needs_no_engine_and_no_torch():
    assert not modules_after("import miles_core") & {*ENGINES, "torch", "transformers", "pandas", "matplotlib"}


def test_no_module_of_core_outside_cluster_needs_an_engine():
    core = importlib.import_module("miles_core")
    names = [module.name for module in pkgutil.walk_packages(core.__path__, "miles_core.", onerror=None)]
    light = [name for name in names if not name.startswith("miles_core.cluster")]
    assert "miles_core.loop" in light
    loaded = modules_after("import importlib\nfor name in " + repr(light) + ": importlib.import_module(name)")
    assert not loaded & set(ENGINES)


@pytest.mark.parametrize("package", ["miles_sync", "miles_precision", "miles_lora"])
def test_a_library_brings_no_engine_and_no_other_room(package: str):
    loaded = modules_after(f"import {package}")
    assert not loaded & set(ENGINES)
    assert {name for name in loaded if name.startswith("miles_")} == {package}


@pytest.fixture(scope="module")
def house(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all sources that import-linter can look at."""
    copy = tmp_path_factory.mktemp("house")
    shutil.copy(root / "pyproject.toml", copy)
    for source in [*root.glob("packages/*/src/*"), *root.glob("apps/*/src/*")]:
        shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def lint(house: Path) -> str:
    """What lint-imports says of the copy."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    environment = os.environ | {"PYTHONPATH": str(house), "COLUMNS": "200"}
    return subprocess.run(
        [*command, "--no-cache", "--no-logo"], cwd=house, env=environment, capture_output=True, text=True, check=False
    ).stdout


def test_the_contracts_are_kept(house: Path):
    assert ", 0 broken." in lint(house)


@pytest.mark.parametrize(("module", "line", "contract"), BREACHES, ids=lambda value: str(value))
def test_a_breach_is_noticed(house: Path, module: str, line: str, contract: str):
    file = house / module
    before = file.read_text()
    try:
        file.write_text(before + f"\n{line}\n")
        report = lint(house)
    finally:
        file.write_text(before)
    broken = [text for text in report.splitlines() if " BROKEN" in text]
    assert any(text.startswith(contract) for text in broken), report
