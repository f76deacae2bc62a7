import importlib
import os
import subprocess
import sys

import pytest

DOORS = ["miles_core", "miles_core.algorithms", "miles_core.observe"]
LIGHT = [*DOORS, *(f"miles_core.{name}" for name in ("batching", "data", "hooks", "loop", "queue", "tasks"))]
HEAVY = ["torch", "ray", "sglang", "megatron", "transformer_engine", "matplotlib", "tensorboard", "wandb", "pandas"]


@pytest.mark.parametrize("name", DOORS)
def test_what_a_door_names_is_there_once(name: str):
    door = importlib.import_module(name)
    assert len(set(door.__all__)) == len(door.__all__)
    assert all(hasattr(door, attribute) for attribute in door.__all__)


def test_core_is_light():
    code = f"import sys, {', '.join(LIGHT)}; print([name for name in {HEAVY} if name in sys.modules])"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
