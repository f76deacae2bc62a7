"""The plans of stock SGLang's own models, tensor-parallel ranks simulated: replayed twice, equal to their loader."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The released wheel of sgl_kernel needs a CUDA driver to import; nothing of it is called to construct and load a model.
_KERNELS = """
import torch
__version__ = "0"
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _name in ("fused_sigmoid_mul_cpu", "fused_qk_gemma_rmsnorm_cpu", "fused_qk_gemma_rmsnorm_with_gate_cpu",
              "fused_qkvzba_split_reshape_cat_contiguous_cpu"):
    _library.define(_name + "(Tensor x) -> Tensor")
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def missing(*args, **kwargs):
        raise NotImplementedError(name)
    return missing
"""

FAMILIES = (
    "qwen2",
    "qwen3",
    "qwen3_one_kv_head",
    "llama",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
)


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the script found, family by family: one process, for SGLang takes 10 s to import."""
    if importlib.util.find_spec("sglang") is None:
        pytest.skip("SGLang is not installed: pip install 'miles-sync[sglang]'")
    path = tmp_path_factory.mktemp("kernels")
    (path / "sgl_kernel").mkdir()
    (path / "sgl_kernel" / "__init__.py").write_text(_KERNELS)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH", "")])),
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    script = Path(__file__).with_name("sglang_families.py")
    done = subprocess.run(
        [sys.executable, str(script), *FAMILIES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_the_loader_for_every_rank_and_a_second_sync_changes_nothing(
    examined: list[dict[str, Any]], family: str
) -> None:
    found = [facts for facts in examined if facts["family"] == family]
    assert [facts["rank"] for facts in found] == [None, 0, 1]
    alone, first, both = found
    assert alone["partial"] == 0 and first["unread"] and not both["unread"]
    # Gemma's norms keep 1 + weight beside the weight; nothing else of these families is computed.
    assert all(name.endswith("norm.weight") for name in alone["through_loader"])
    assert bool(alone["through_loader"]) == (family in ("qwen3_next", "qwen3_5", "qwen3_5_moe"))
    assert alone["refreshes"] == family.startswith("deepseek")
    assert alone["copies"] < alone["tensors"]
