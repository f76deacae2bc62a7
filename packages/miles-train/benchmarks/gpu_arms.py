"""What `gpu_step` measures: each arm is a function of a `Bench` that returns a JSON-able dict."""

import gc
import json
import os
import statistics
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_models
import numpy as np
import torch
from gpu_stock import StockModel

from miles_core.algorithms.losses import PPOClip
from miles_core.types import Batch
from miles_train.flops import forward_flops
from miles_train.megatron import MegatronTrainer, head
from miles_train.megatron.weights.names import global_name

# Dense bfloat16 of H100 and H200 SXM, by the vendor.
PEAK = 989.4e12
SAMPLE = 1024


@dataclass(slots=True)
class Bench:
    """What arms share.

    Attributes:
        folder: for models, gone afterwards.
        out: for profiles.
        tiny: whether models are tiny.
    """

    folder: Path
    out: Path
    tiny: bool

    def sized(self, config: dict[str, Any], num_layers: int | None = None) -> dict[str, Any]:
        """The config with another number of layers; tiny, if asked for."""
        config = {**config, "num_hidden_layers": num_layers or config["num_hidden_layers"]}
        if not self.tiny:
            return config
        small = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "vocab_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        mixture = experts if "num_experts" in config else {}
        return {**config, **small, **mixture, "num_hidden_layers": min(2, config["num_hidden_layers"])}

    def lengths(self, tokens: int) -> "np.ndarray[Any, Any]":
        """Samples of 1024 tokens."""
        return np.full(2 if self.tiny else tokens // SAMPLE, 32 if self.tiny else SAMPLE)

    @property
    def memory_gib(self) -> float:
        """Of the GPU."""
        return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 8.0


def run_arms(names: Sequence[str], out: Path, *, tiny: bool) -> None:
    """Run arms, each recorded as it ends, also where it raised."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), out, tiny)
        for name in names:
            start = time.perf_counter()
            try:
                result = ARMS[name](bench)
            except Exception:  # noqa: BLE001  # the next arm may work
                result = {"error": traceback.format_exc()[-3000:]}
            _clean_up()  # here, where no exception holds on to frames and their tensors
            result = {"arm": name, "device": _device(), **result, "arm_s": round(time.perf_counter() - start, 1)}
            line = json.dumps(result)
            with (out / "results.jsonl").open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)
    os._exit(0)  # NCCL and Megatron leave threads behind


def gemm(bench: Bench) -> dict[str, Any]:
    """Rate of bfloat16 products on random numbers: a large one, and those of Qwen3-0.6B at 32k tokens."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    rates = {}
    for rows, inner, columns in ((8192, 8192, 8192), (32768, 1024, 6144), (32768, 2048, 1024), (16384, 1024, 151936)):
        a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16).t()
        seconds = _kernel_seconds(lambda a=a, b=b: a @ b)
        rates[f"{rows}x{inner}x{columns}"] = round(2 * rows * inner * columns / seconds / 1e12, 1)
    return {"tflops": rates}


def correct(bench: Bench) -> dict[str, Any]:
    """bfloat16 by Transformer Engine beside float32 by torch, packed beside padded, on the same weights."""
    config = bench.sized(gpu_models.QWEN3_0_6B, 4)
    return {"head_kernels": _head_kernels()} | _compare(
        bench, config, np.array([1, 2, 7, 33, 128, 500, 777, 1024, 1500, 64, 300, 301])
    )


def correct_moe(bench: Bench) -> dict[str, Any]:
    """As `correct`, for a mixture; rounding sends some tokens to other experts: see the quantiles."""
    config = {**bench.sized(gpu_models.QWEN3_30B_A3B, 2), "num_experts": 16, "num_experts_per_tok": 4}
    return _compare(bench, config, np.array([2, 33, 128, 500, 301]))


def ours_0_6b(bench: Bench) -> dict[str, Any]:
    """A whole training step of Qwen3-0.6B on packed samples of 1024 tokens, and its profile."""
    config = bench.sized(gpu_models.QWEN3_0_6B)
    path = gpu_models.make_model(bench.folder / "0.6b", config)
    result: dict[str, Any] = {}
    for micro in (32768, 16384) if bench.memory_gib > 100 else (24576, 16384):
        with _trainer(path, micro_batch_tokens=micro) as trainer:
            result[f"micro_{micro}"] = {
                f"{count}_micro_batches": _measure(trainer, config, bench.lengths(count * micro)) for count in (1, 4)
            }
            if "implementation" not in result:
                result["implementation"] = trainer._args.transformer_impl
                batch = gpu_models.make_batch(bench.lengths(micro), config["vocab_size"])
                result["profile"] = _profile(trainer, batch, bench.out / "profile-0.6b.txt")
                logprobs = _measure_logprobs(trainer, config, bench.lengths(4 * micro))
                step = result[f"micro_{micro}"]["4_micro_batches"]
                seconds = logprobs["step_s"] + step["step_s"]
                result["old_logprobs"] = logprobs
                result["rl_phase"] = {
                    "note": "old logprobs and the update, of 4 micro-batches",
                    "tokens_per_s": round(step["tokens"] / seconds),
                    "mfu": round((logprobs["mfu"] * logprobs["step_s"] + step["mfu"] * step["step_s"]) / seconds, 4),
                }
    return result


def padded_0_6b(bench: Bench) -> dict[str, Any]:
    """The same without packing: what packing costs where all samples are equally long."""
    config = bench.sized(gpu_models.QWEN3_0_6B)
    path = gpu_models.make_model(bench.folder / "padded", config)
    with _trainer(path, micro_batch_tokens=16384, packed=False) as trainer:
        return _measure(trainer, config, bench.lengths(65536))


def stock_0_6b(bench: Bench) -> dict[str, Any]:
    """Stock Megatron's own spec and loss on Transformer Engine, nothing tuned."""
    config = bench.sized(gpu_models.QWEN3_0_6B)
    result: dict[str, Any] = {}
    for tokens in (16384, 32768):  # the larger one may not fit
        lengths = bench.lengths(tokens)
        try:
            model = StockModel(config, lengths)
            result[f"micro_{tokens}"] = _timed(model.step, forward_flops(config).training(lengths, int(lengths.sum())))
            result[f"micro_{tokens}"]["tokens_per_s"] = round(
                float(lengths.sum()) / result[f"micro_{tokens}"]["step_s"]
            )
            model.close()
        except torch.OutOfMemoryError as error:
            result[f"micro_{tokens}"] = {"error": str(error)[:200]}
        finally:
            model = None
            _clean_up()
    return result


def ours_8b(bench: Bench) -> dict[str, Any]:
    """Qwen3-8B's shapes at two depths that fit with their optimizer state; the whole model is extrapolated."""
    shallow, deep = (6, 12) if bench.memory_gib > 100 else (3, 6)
    return _by_depth(bench, gpu_models.QWEN3_8B, shallow, deep, 8192)


def ours_30b_a3b(bench: Bench) -> dict[str, Any]:
    """Layers of Qwen3-30B-A3B, all 128 experts, at two depths that fit with their optimizer state."""
    shallow, deep = (2, 4) if bench.memory_gib > 100 else (1, 2)
    return _by_depth(bench, gpu_models.QWEN3_30B_A3B, shallow, deep, 8192)


ARMS: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "gemm": gemm,
    "correct": correct,
    "ours-0.6b": ours_0_6b,
    "stock-0.6b": stock_0_6b,
    "correct-moe": correct_moe,
    "ours-30b-a3b": ours_30b_a3b,
    "ours-8b": ours_8b,
    "padded-0.6b": padded_0_6b,
}


def _by_depth(bench: Bench, config: dict[str, Any], shallow: int, deep: int, tokens: int) -> dict[str, Any]:
    result: dict[str, Any] = {"whole_layers": config["num_hidden_layers"]}
    seconds = {}
    for depth in (shallow, deep):
        sized = bench.sized(config, depth)
        path = gpu_models.make_empty_model(bench.folder / f"depth-{depth}", sized)
        with _trainer(path, micro_batch_tokens=tokens) as trainer:
            gpu_models.randomise(trainer)
            measured = _measure(trainer, sized, bench.lengths(2 * tokens), steps=3)
            if depth == deep:
                batch = gpu_models.make_batch(bench.lengths(2 * tokens), sized["vocab_size"])
                name = f"profile-{sized['architectures'][0]}-{depth}.txt"
                result["profile"] = _profile(trainer, batch, bench.out / name)
        seconds[depth] = measured["step_s"]
        result[f"{depth}_layers"] = {**measured, "parameters": gpu_models.num_parameters(sized)}
    per_layer = (seconds[deep] - seconds[shallow]) / max(1, deep - shallow)
    whole = seconds[deep] + per_layer * (config["num_hidden_layers"] - deep)
    lengths = bench.lengths(2 * tokens)
    full = bench.sized(config)
    flops = forward_flops(full).training(lengths, int(lengths.sum()) - len(lengths))
    result["whole_model_extrapolated"] = {
        "note": "step time at two depths continued to all layers; it was not run",
        "step_s": whole,
        "tokens_per_s": round(float(lengths.sum()) / whole),
        "mfu": round(flops / whole / PEAK, 4),
    }
    return result


def _measure(trainer: Any, config: dict[str, Any], lengths: Any, steps: int = 5) -> dict[str, Any]:
    """A whole `step`: packing, forward, backward, optimizer, metrics."""
    batch = gpu_models.make_batch(lengths, config["vocab_size"])
    flops = forward_flops(config).training(lengths, batch.num_loss_tokens)
    result = _timed(lambda: trainer.step([batch]), flops, steps)
    return {**result, "tokens": len(batch.tokens), "tokens_per_s": round(len(batch.tokens) / result["step_s"])}


def _measure_logprobs(trainer: Any, config: dict[str, Any], lengths: Any) -> dict[str, Any]:
    """Old logprobs: a forward pass over the whole batch."""
    batch = gpu_models.make_batch(lengths, config["vocab_size"])
    flops = forward_flops(config).of(lengths, batch.num_loss_tokens)
    result = _timed(lambda: trainer.logprobs(batch), flops, 3)
    return {**result, "tokens": len(batch.tokens), "tokens_per_s": round(len(batch.tokens) / result["step_s"])}


def _timed(action: Callable[[], Any], flops: float, steps: int = 5) -> dict[str, Any]:
    for _ in range(2):
        action()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        _synchronize()
        start = time.perf_counter()
        action()
        _synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return {
        "step_s": seconds,
        "min_s": min(times),
        "max_s": max(times),
        "tflops": round(flops / seconds / 1e12, 1),
        "mfu": round(flops / seconds / PEAK, 4),
        "peak_gb": round(peak, 1),
    }


def _profile(trainer: Any, batch: Batch, file: Path) -> dict[str, Any]:
    """One step's kernels by time: the largest in a text file, sums by kind in the result."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    _synchronize()
    start = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as profiler:
        trainer.step([batch])
        _synchronize()
    wall = time.perf_counter() - start
    kernels = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels) / 1e6
    lines = [f"{len(batch.tokens)} tokens, wall {wall:.4f} s (profiled), kernels {total:.4f} s", ""]
    lines += [
        f"{event.self_device_time_total / 1e3:10.3f} ms {event.count:6d} x  {event.key[:150]}" for event in kernels[:70]
    ]
    file.write_text("\n".join(lines) + "\n")
    sums: dict[str, float] = {}
    for event in kernels:
        kind = next((kind for kind, words in _KINDS.items() if any(word in event.key for word in words)), "other")
        sums[kind] = sums.get(kind, 0.0) + event.self_device_time_total / 1e3
    by_kind = {kind: round(value, 2) for kind, value in sorted(sums.items(), key=lambda item: -item[1])}
    return {"wall_s": wall, "kernels_s": total, "ms_by_kind": by_kind}


_KINDS = {
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated", "cudnn_fused"),
    "head": ("_row_statistics", "_become_gradient"),
    "gemm": ("gemm", "nvjet", "cutlass", "sm90_xmma"),
    "norm": ("rmsnorm", "RMSNorm", "rms_norm", "norm::"),
    "rope": ("rope",),
    "optimizer": ("adam", "Adam", "multi_tensor", "l2norm", "L2Norm"),
    "activation": ("swiglu", "silu"),
    "embedding": ("embedding", "index", "gather", "scatter", "sort", "radix"),
    "copy": ("copy", "Memcpy", "Memset", "cat", "fill"),
    "elementwise": ("elementwise", "triton", "reduce"),
}


def _compare(bench: Bench, config: dict[str, Any], lengths: Any) -> dict[str, Any]:
    """Logprobs of every way to compute them, against float32 and padded; gradients too."""
    path = gpu_models.make_model(bench.folder / "compared", config)
    batch = gpu_models.make_batch(lengths, config["vocab_size"])
    ways: dict[str, dict[str, Any]] = {
        "fp32_local_padded": {"bf16": False, "packed": False},
        "fp32_local_packed": {"bf16": False, "packed": True},
        "bf16_local_padded": {"transformer_impl": "local", "packed": False},
        "bf16_te_padded": {"packed": False},
        "bf16_te_packed": {"packed": True},
    }
    logprobs, gradients, result = {}, {}, {}
    for name, settings in ways.items():
        packed = settings.pop("packed")
        try:
            with _trainer(path, settings, micro_batch_tokens=2048, packed=packed) as trainer:
                result[name] = {"implementation": trainer._args.transformer_impl}
                logprobs[name] = trainer.logprobs(batch)
                metrics = trainer.step([batch])
                gradients[name] = _gradients(trainer)
                result[name] |= {key: metrics[key] for key in ("loss", "grad_norm", "entropy")}
        except Exception:  # noqa: BLE001  # the other ways are worth knowing
            result[name] = {"error": traceback.format_exc()[-1500:]}
        _clean_up()
    for name, reference in (
        *((way, "fp32_local_padded") for way in list(ways)[1:]),
        ("bf16_te_packed", "bf16_te_padded"),
        ("bf16_te_packed", "bf16_local_padded"),
    ):
        if name in logprobs and reference in logprobs:
            result[f"{name} - {reference}"] = {
                **_difference(logprobs[name], logprobs[reference], batch.loss_mask),
                **_worst_gradient(gradients[name], gradients[reference]),
            }
    return result


def _head_kernels() -> dict[str, Any]:
    """Largest difference of the head's kernels from torch on a CPU; both ways of `_compare` use them."""
    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(64, 151936, generator=torch.Generator().manual_seed(0))).to(dtype)
        targets = torch.arange(64) * 2374
        here = head.row_statistics(logits, targets, 151900, 0.8)
        there = head.row_statistics(logits.cuda(), targets.cuda(), 151900, 0.8)
        normaliser = here[0] + here[1].log()
        entropy = normaliser - here[2] / here[1]
        worst[f"{dtype} statistics"] = max(
            float(((a - b.cpu()).abs() / a.abs().clamp_min(1)).max()) for a, b in zip(here, there, strict=True)
        )
        columns = (targets, normaliser, entropy, torch.rand(64), torch.rand(64))
        copy = logits.cuda()
        head.become_gradient(copy, *(column.cuda() for column in columns), vocab=151900, temperature=0.8)
        head.become_gradient(logits, *columns, vocab=151900, temperature=0.8)
        worst[f"{dtype} gradient"] = float((logits.float() - copy.cpu().float()).abs().max())
    return worst


def _difference(ours: Any, theirs: Any, mask: Any) -> dict[str, Any]:
    d = (ours - theirs)[mask].astype(np.float64)
    return {
        "max": float(np.abs(d).max()),
        "mean": float(np.abs(d).mean()),
        "median": float(np.median(np.abs(d))),
        "p99": float(np.quantile(np.abs(d), 0.99)),
        "k3": float((np.exp(d) - d - 1).mean()),
    }


def _gradients(trainer: Any) -> dict[str, Any]:
    """The gradients that the last update used, by parameter, in host memory."""
    named = {}
    for core in trainer._cores:
        for name, parameter in core.named_parameters():
            named[global_name(core, name)] = parameter.main_grad.detach().float().cpu()
    return named


def _worst_gradient(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter whose gradient differs most, relative to its norm."""
    distances = {
        name: float((ours[name] - other).norm() / other.norm().clamp_min(1e-30))
        for name, other in theirs.items()
        if name in ours
    }
    worst = max(distances, key=lambda name: distances[name])
    return {
        "worst_gradient": [worst, distances[worst]],
        "median_gradient": statistics.median(distances.values()),
        "compared": len(distances),
    }


@contextmanager
def _trainer(path: Path, settings: Mapping[str, Any] | None = None, **more: Any) -> Iterator[Any]:
    loss: Any = PPOClip()
    # Too small a rate to move a bfloat16 weight: every step does the same work.
    trainer = MegatronTrainer(path, {"lr": 1e-8, "bf16": True, **(settings or {})}, loss, **more)
    try:
        yield weakref.proxy(trainer)  # the caller's variable outlives the block, and must not keep the model
    finally:
        trainer.close()
        del trainer
        _clean_up()


def _clean_up() -> None:
    from megatron.core import parallel_state  # noqa: PLC0415  # whatever a failed arm left

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _kernel_seconds(action: Callable[[], Any], repeats: int = 10) -> float:
    for _ in range(3):
        action()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _device() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
