"""The CPU shim, without an engine."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from miles_rollout.sglang import cpu


def run(code: str, **environment: str) -> str:
    """What Python prints that runs `code` in a process of its own, as patches of torch must not stay in this one."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.check_version()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.99")
    with pytest.raises(ImportError, match=r"tested with sglang 0\.5\.17; 0\.5\.99 is installed"):
        cpu.check_version()


def test_the_stand_in_is_on_the_engines_path_alone() -> None:
    environment = cpu.environment({"PYTHONPATH": "/somewhere", "HOME": "/root"}, ["Qwen3ForCausalLM"])
    ahead, _, rest = environment["PYTHONPATH"].partition(os.pathsep)
    assert rest == "/somewhere" and environment["HOME"] == "/root"
    find = "import importlib.util; print(importlib.util.find_spec('sgl_kernel').origin)"
    assert run(find, PYTHONPATH=ahead) == str(Path(ahead, "sgl_kernel", "__init__.py"))
    assert "miles_rollout" not in run(find, PYTHONPATH="")


def test_only_models_that_can_be_meant_are_imported() -> None:
    left_out = set(cpu.environment({}, ["Qwen3ForCausalLM"])["SGLANG_DISABLED_MODEL_ARCHS"].split(","))
    assert {"llama", "deepseek_v2", "gpt_oss"} <= left_out
    assert not left_out & {"qwen3", "transformers"}


def test_packages_left_out_count_as_not_installed() -> None:
    code = (
        "import importlib.util; from miles_rollout.sglang import cpu; cpu.leave_out_unused();"
        "print(importlib.util.find_spec('sklearn'))\n"
        "try: import sklearn\n"
        "except ModuleNotFoundError: print('not found')"
    )
    assert run(code).split() == ["None", "not", "found"]


def test_the_hash_is_the_gpu_kernels() -> None:
    """Bit by bit what the Triton kernel gives, which runs here in Triton's interpreter."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    kernel = Path(spec.submodule_search_locations[0], "kernels", "ops", "sampling", "murmur_hash.py")
    code = f"""
import importlib.util, torch
from miles_rollout.sglang.cpu import murmur_hash32
spec = importlib.util.spec_from_file_location("murmur_hash", {str(kernel)!r})
upstream = importlib.util.module_from_spec(spec)
spec.loader.exec_module(upstream)
seeds = torch.tensor([0, 1, 42, 2**31, 2**40 + 7, 2**63 - 1, 123456789012345])
positions = torch.tensor([0, 1, 5, 100, 4096, 70000, 3])
columns = torch.arange(1500)
wanted = upstream.murmur_hash32(seeds.to(torch.uint64), positions, columns)
got = murmur_hash32(seeds.to(torch.uint64), positions, columns)
assert got.dtype == wanted.dtype
print(torch.equal(got.to(torch.int64), wanted.to(torch.int64)))
"""
    assert run(code, TRITON_INTERPRET="1") == "True"


def test_rows_do_not_depend_on_their_number() -> None:
    code = """
import json, torch
from torch.nn.functional import linear
from miles_rollout.sglang import cpu
torch.set_num_threads(1)

def differing(dtype):
    x, w, b = (torch.randn(*shape).to(dtype) for shape in ((300, 96), (40, 96), (40,)))
    for bias in (None, b):
        whole = linear(x, w, bias)
        yield from (n for n in range(1, 40) if not torch.equal(linear(x[7:7+n], w, bias), whole[7:7+n]))

x, w, b = torch.randn(5, 96), torch.randn(40, 96), torch.randn(40)
plain = linear(x, w, b)
cpu.enable_batch_invariance()
change = float((linear(x, w, b) - plain).abs().max())
print(json.dumps([[*differing(torch.float32), *differing(torch.bfloat16)], change]))
"""
    differing, largest_change = json.loads(run(code))
    assert differing == [] and largest_change < 1e-4


def test_a_machine_that_cannot_is_refused() -> None:
    code = """
import torch
from miles_rollout.sglang import cpu
cpu._MIN_ROWS = 0
honest = torch.mm
torch.mm = lambda a, b, out: honest(a, b, out=out).mul_(1 + 1e-3 * (a.shape[0] < 20))
cpu.enable_batch_invariance()
try:
    torch.nn.functional.linear(torch.randn(2, 8), torch.randn(4, 8))
except RuntimeError as error:
    print(error)
"""
    assert "set deterministic = false" in run(code)
