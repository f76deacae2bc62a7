"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest
import train_tiny

pytestmark = pytest.mark.xdist_group("train-megatron")


def test_the_example_runs(ranks, tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    train_tiny.make_model(tmp_path / "models" / "tiny")
    ranks.run_one("in_rank_trainer.run_example", code, tmp_path)
    assert (tmp_path / "models" / "better" / "model.safetensors").is_file()
