"""The README's examples, as written, and the door as it stands."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import miles_rollout
from miles_core.types import Prompt, Sample, VersionSpan
from miles_rollout import InProcessJudge, Verdict

CODE = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.mark.xdist_group("rollout-engine")
def test_the_example_runs(tiny_model: Path, tmp_path: Path) -> None:
    values = f"from pathlib import Path\nMODEL = {str(tiny_model)!r}\nLOG = Path({str(tmp_path / 'log')!r})\n"
    done = subprocess.run([sys.executable, "-c", values + CODE[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("VersionSpan(start=0") == 4


def test_the_reward_judges() -> None:
    names: dict[str, Any] = {}
    exec(compile(CODE[1], "README.md", "exec"), names)
    tokens = np.zeros(2, np.int32)
    sample = Sample(tokens, tokens == 0, tokens.astype(np.float32), (VersionSpan(1, 2, 0),), "stop", " 46 ")
    verdicts = asyncio.run(InProcessJudge(names["score"], "score").judge(Prompt("p", "", {"answer": "46"}), [sample]))
    assert verdicts == [Verdict(1.1, {"right": 1.0})]


def test_the_door_is_complete_and_light() -> None:
    assert all(hasattr(miles_rollout, name) for name in miles_rollout.__all__)
    code = (
        "import sys, miles_rollout, miles_rollout.conformance\n"
        "assert not {'sglang', 'ray', 'megatron', 'torch', 'transformers', 'aiohttp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
