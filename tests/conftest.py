"""What the tests of the whole house share."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the workspace."""
    return ROOT


@pytest.fixture(scope="session")
def uv() -> Callable[..., str]:
    """Run uv with these arguments, in the workspace or in `cwd`; returns what it printed, fails on its error."""
    binary = os.environ.get("UV") or shutil.which("uv")  # `uv run` says in UV which one it was
    assert binary, "these tests need uv: start them with `uv run pytest`"
    # An environment that is active would be installed into, or win over --python.
    environment = {key: value for key, value in os.environ.items() if key not in {"VIRTUAL_ENV", "UV_PYTHON"}}

    def run(*arguments: str | Path, cwd: Path = ROOT) -> str:
        done = subprocess.run(
            [binary, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"uv {' '.join(map(str, arguments))}\n{done.stderr}"
        return done.stdout

    return run
