"""The CPU shim: what stock SGLang 0.5.17 lacks to serve on a machine without a GPU, in one named place.

In the owner's process: `environment` and `ARGUMENTS`. In the engine's process: `install`, which uses SGLang's own hook
registry (sglang.srt.plugins) and no assignment into SGLang:

- `sgl_kernel`: the wheel needs libcuda.so.1 to import; a stand-in lies in `_cpu_path`.
- Processes fork after the imports instead of importing three times: 32 s -> 17 s to start, a third of the memory. Safe
  here because no CUDA context and, at that time, no thread of Python's exists.
- What the engine would import and never use is left out: 17 s -> 13 s.
- Seeds: `sampling_seed` needs deterministic inference, which knows CUDA kernels only. Given here: the same hash of
  seed and position in torch (bit-equal to the Triton kernel), and a batch-invariant matrix product.
"""

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTED_VERSION = "0.5.17"

ARGUMENTS: Mapping[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    # Of the machine's memory, for weights and cache; max_total_tokens is what bounds the cache.
    "mem_fraction_static": 0.1,
    "max_total_tokens": 32768,
}

DETERMINISTIC_ARGUMENTS: Mapping[str, Any] = {
    "enable_deterministic_inference": True,
    # A prompt cut in two computes attention in other shapes than one in a piece.
    "chunked_prefill_size": -1,
}

# BLAS takes other paths (dot products, small-matrix kernels) for fewer rows than this, with other last bits.
_MIN_ROWS = 8


def check_version() -> None:
    """Refuse to shim an SGLang that the shim was not tested with.

    Raises:
        ImportError: another version is installed.
    """
    version = importlib.metadata.version("sglang")
    if version != TESTED_VERSION:
        raise ImportError(
            f"The CPU shim of miles_rollout.sglang was tested with sglang {TESTED_VERSION}; {version} is installed. "
            'Install the tested one: pip install "miles-rollout[sglang]"'
        )


def environment(inherited: Mapping[str, str], architectures: Sequence[str]) -> dict[str, str]:
    """The environment of a CPU engine process.

    Args:
        inherited: the owner's environment. OMP_NUM_THREADS is overridden: more than one thread a process was seen to
            cost a factor of twenty, in spinning on shared cores.
        architectures: of the model, from its config.json: SGLang need not import the others, two hundred modules.
    """
    path = [str(Path(__file__).parent / "_cpu_path"), inherited.get("PYTHONPATH", "")]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # Nothing on a CPU may need a compiler.
        "TORCHDYNAMO_DISABLE": "1",
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_other_models(architectures)),
    }


def _other_models(architectures: Sequence[str]) -> list[str]:
    """Modules of sglang.srt.models that do not mention these architectures."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0], "srt", "models")
    wanted = [name.encode() for name in (*architectures, "TransformersForCausalLM")]
    return [path.stem for path in folder.glob("*.py") if not any(name in path.read_bytes() for name in wanted)]


def leave_out_unused() -> None:
    """Have optional packages that a CPU engine would import and never use count as not installed, in this process.

    They are a fifth of the modules that SGLang's import takes in: 2.5 of 14 s. `None` in sys.modules is Python's own
    word for it: imports raise ModuleNotFoundError and find_spec finds nothing.
    """
    for name in ("cutlass", "flashinfer", "megatron", "pandas", "sklearn"):
        sys.modules[name] = None  # type: ignore[assignment]


def install(deterministic: bool) -> None:
    """Register the hooks in the engine's main process; its children inherit them by forking.

    Args:
        deterministic: also those that make `sampling_seed` work.
    """
    check_version()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # noqa: PLC0415  engine process only

    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork_children, HookType.AFTER)
    if deterministic:
        from sglang.srt.server_args import add_deterministic_attention_backend_choices  # noqa: PLC0415

        add_deterministic_attention_backend_choices(["torch_native"])
        sampler = "sglang.srt.layers.sampler"
        HookRegistry.register(f"{sampler}.murmur_hash32", murmur_hash32, HookType.REPLACE)
        HookRegistry.register(
            f"{sampler}.top_k_top_p_min_p_sampling_from_probs_torch", sample_narrowed, HookType.REPLACE
        )
        HookRegistry.register(
            "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode", enable_batch_invariance, HookType.REPLACE
        )


def _fork_children(*_: Any, **__: Any) -> None:
    import gc  # noqa: PLC0415
    import multiprocessing  # noqa: PLC0415

    gc.freeze()  # a collection in a child would copy every page that it marks
    multiprocessing.set_start_method("fork", force=True)


def murmur_hash32(seed: Any, positions: Any, col_indices: Any) -> Any:
    """MurmurHash3 of (seed, position, column), as sglang.kernels.ops.sampling.murmur_hash computes it on a GPU.

    Args:
        seed: uint64 or int64 [n].
        positions: int [n].
        col_indices: int [m].

    Returns:
        uint32 [n, m].
    """
    import torch  # noqa: PLC0415  engine process only

    low = 0xFFFFFFFF

    def rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
        return ((x << bits) | (x >> (32 - bits))) & low

    def mix(h: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = (rotate((k * 0xCC9E2D51) & low, 15) * 0x1B873593) & low
        return (rotate(h ^ k, 13) * 5 + 0xE6546B64) & low

    # int64 throughout: products wrap modulo 2**64, of which the low 32 bits are what uint32 arithmetic gives.
    seed, positions, columns = (t.to(torch.int64) for t in (seed, positions, col_indices))
    h = torch.zeros_like(seed)
    for block in (seed & low, (seed >> 32) & low, positions & low):
        h = mix(h, block)
    h = mix(h[:, None], columns[None, :] & low) ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & low
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & low
    return (h ^ (h >> 16)).to(torch.uint32)


def sample_narrowed(
    probs: Any,
    top_ks: Any,
    top_ps: Any,
    min_ps: Any,
    need_min_p_sampling: bool,
    sampling_seed: Any,
    positions: Any,
) -> Any:
    """Seeded sampling where some request of the batch has top-k, top-p or min-p; others get what they get without it.

    SGLang's own sorts the candidates first and hashes their places in that order, so a request's tokens would depend on
    its company, also on one that has just ended: a running batch keeps the narrower path until it is empty.

    Args:
        probs: float [n, vocabulary].
        top_ks: int [n], as many as the vocabulary or more for all.
        top_ps: float [n].
        min_ps: float [n].
        need_min_p_sampling: whether any of them counts.
        sampling_seed: int64 [n].
        positions: int [n].

    Returns:
        int32 [n], the sampled ids.
    """
    import torch  # noqa: PLC0415  engine process only
    from sglang.srt.layers.sampler import sampling_from_probs_torch  # noqa: PLC0415

    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(probs.shape[-1])
    out = (places >= top_ks.view(-1, 1)) | (ordered.cumsum(-1) - ordered > top_ps.view(-1, 1))
    if need_min_p_sampling:
        out |= ordered < ordered[:, :1] * min_ps.view(-1, 1)
    # Rounding may leave the sum of a whole row above 1: nothing narrows a request that asks for all of it.
    out &= ((top_ks < probs.shape[-1]) | (top_ps < 1) | (min_ps > 0)).view(-1, 1)
    narrowed = probs.masked_fill(torch.zeros_like(out).scatter(-1, index, out), 0.0)
    return sampling_from_probs_torch(narrowed, sampling_seed=sampling_seed, positions=positions)


def enable_batch_invariance() -> None:
    """Make every row of a matrix product independent of how many rows there are, for this process.

    On a machine whose BLAS is not row-invariant even so, the first product in that dtype raises RuntimeError, which
    ends the engine: deterministic generation is refused there.
    """
    import torch  # noqa: PLC0415  engine process only

    checked: set[torch.dtype] = set()

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype not in checked:
            checked.add(a.dtype)
            _check_rows(a.dtype)
        rows = a.shape[0]
        if 0 < rows < _MIN_ROWS:
            a = torch.cat([a, a.new_zeros(_MIN_ROWS - rows, a.shape[1])])
        # The `out` overload is another operator, so this does not come back here.
        return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))[:rows]

    def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1):
        return mm(a, b).mul_(alpha).add_(bias * beta)

    global _library
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it overrides the kernel: yes
        _library.impl("mm", mm, "CPU")
        _library.impl("addmm", addmm, "CPU")


_library: Any = None  # the override lasts as long as this object


def _check_rows(dtype: Any) -> None:
    import torch  # noqa: PLC0415  engine process only

    generator = torch.Generator().manual_seed(0)
    for inner, outer in ((64, 128), (128, 64), (576, 192), (1536, 576)):
        rows = torch.randn(600, inner, generator=generator).to(dtype)
        weight = torch.randn(outer, inner, generator=generator).to(dtype)
        whole = torch.nn.functional.linear(rows, weight)
        for count in (1, 3, 7, 8, 9, 17, 64, 255, 512):
            if not torch.equal(torch.nn.functional.linear(rows[5 : 5 + count], weight), whole[5 : 5 + count]):
                raise RuntimeError(
                    "deterministic generation needs matrix products whose rows do not depend on their number, and "
                    f"this machine's ({count} of 600 rows, {inner} x {outer}, {dtype}) do: set deterministic = false"
                )
