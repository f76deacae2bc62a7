"""The README's example, as written, and the door as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import miles_sync

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs() -> None:
    code = re.search(r"```python\n(import torch.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code.group(1), "README.md", "exec"), {})


def test_the_door_is_complete() -> None:
    assert all(hasattr(miles_sync, name) for name in miles_sync.__all__)


def test_importing_it_loads_no_engine_and_opens_no_group() -> None:
    code = (
        "import sys, torch, miles_sync, miles_sync.sglang\n"
        "assert not {'sglang', 'ray', 'megatron', 'transformers', 'vllm'} & set(sys.modules)\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert not [name for name in sys.modules if name.startswith('miles_') and not name.startswith('miles_sync')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
