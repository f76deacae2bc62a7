"""Each package alone: its wheel and what it declares, in an empty environment, at the lock's versions.

Environments are made of hard links into uv's cache, so six of them take a minute or two and hardly any disk.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from miles_launch.models.tiny import make_copy_model

# On one worker, one after the other: they are heavy on the disk, and one build serves all.
pytestmark = [pytest.mark.xdist_group("install"), pytest.mark.timeout(600)]

PACKAGES = ("miles-core", "miles-rollout", "miles-train", "miles-sync", "miles-precision", "miles-lora")

# What needs an engine, and the extra that its ImportError must name.
NEEDS_EXTRA = {
    "miles-core": [
        ("import miles_core.cluster.runtime", "miles-core[ray]"),
        ("import miles_core.algorithms.losses", "miles-core[torch]"),
        ("from miles_core.observe.sinks import TensorBoardSink; TensorBoardSink('.')", "miles-core[tensorboard]"),
    ],
    "miles-rollout": [("import miles_rollout.sglang", "miles-rollout[sglang]")],
    "miles-train": [("from miles_train.megatron import MegatronTrainer", "miles-train[megatron]")],
    "miles-sync": [("import miles_sync.sglang.loader", "miles-sync[sglang]")],
}

# What the example of a README takes as given: an extra, and names that stand for the reader's own.
EXAMPLE_TAKES = {
    "miles-rollout": (
        "miles-rollout[sglang]",
        "from pathlib import Path; MODEL, LOG = 'models/tiny', Path('server.log').resolve()\n",
    ),
    "miles-train": ("miles-train[megatron]", ""),
}


@pytest.fixture(scope="module")
def constraints(uv: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lock's versions, and for our own packages the wheels built here."""
    folder = tmp_path_factory.mktemp("wheels")
    uv("build", "--all-packages", "--wheel", "--out-dir", folder)
    file = folder / "constraints.txt"
    uv(
        "export", "--frozen", "--no-hashes", "--no-emit-workspace", "--all-packages", "--all-extras", "--no-header",
        "--no-annotate", "--output-file", file,
    )  # fmt: skip
    ours = (f"{wheel.name.split('-')[0].replace('_', '-')} @ {wheel.as_uri()}\n" for wheel in folder.glob("*.whl"))
    file.write_text(file.read_text() + "".join(ours))
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where one environment after the other stands, beside the bytecode of what they share (torch: 10 s to compile)."""
    path = tmp_path_factory.mktemp("alone")
    yield path
    shutil.rmtree(path)  # pytest would keep its many thousand files


@pytest.fixture
def environment(uv: Callable[..., str], place: Path) -> Iterator[Path]:
    """An empty environment."""
    path = place / "environment"
    uv("venv", "--python", sys.executable, path)
    yield path
    shutil.rmtree(path)


def run(environment: Path, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(environment.parent / "bytecode")}
    return subprocess.run(
        [environment / "bin" / "python", "-c", code],
        cwd=cwd, env=clean | ours, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_alone_does_what_its_readme_says(
    package: str, uv: Callable[..., str], constraints: Path, environment: Path, root: Path, tmp_path: Path
):
    """It imports; what needs an engine says which extra to install; the first example of its README runs."""
    install = ("pip", "install", "--python", environment, "--constraints", constraints)
    uv(*install, package)
    done = run(environment, f"import {package.replace('-', '_')}", tmp_path)
    assert done.returncode == 0, done.stderr
    for code, extra in NEEDS_EXTRA.get(package, []):
        done = run(environment, code, tmp_path)
        assert done.returncode == 1
        assert re.search(rf'^ImportError: .*pip install "{re.escape(extra)}"', done.stderr, re.MULTILINE), done.stderr

    readme = (root / "packages" / package / "README.md").read_text()
    if package in EXAMPLE_TAKES:
        extra, given = EXAMPLE_TAKES[package]
        assert f'pip install "{extra}"' in readme
        uv(*install, extra)
        make_copy_model(tmp_path / "models" / "tiny")
    else:
        given = ""
    example = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert example, f"the README of {package} has no example"
    done = run(environment, given + example[1], tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_package_is_installed_alone(root: Path):
    assert sorted(folder.name for folder in (root / "packages").iterdir()) == sorted(PACKAGES)


def test_pytest_xdist_keeps_groups_together(request: pytest.FixtureRequest):
    """pytest 9.2 made pytest-xdist 3.8 forget them in silence (pytest-dev/pytest-xdist#1386): two engines at a time."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@install")
