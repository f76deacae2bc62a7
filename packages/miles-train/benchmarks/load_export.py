"""Times loading and export of a random Qwen3-shaped model beside the disk's own rates: one JSON object on stdout.

OMP_NUM_THREADS=1 python benchmarks/load_export.py [--folder DIR] [--layers 28] [--vocab 151936] [--tensor 1]

The disk is measured in the same run with the same bytes: read in one pass, from the page cache and with the cache
dropped for these files, and written with fsync. Peak memory is the kernel's (VmHWM) between two marks of a rank's
process, less what it held at the first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miles_train.megatron.weights import table_for
from miles_train.megatron.weights.qwen3 import table
from miles_train.model_dir import open_model_directory
from miles_train.shard_files import Entry, ShardFile, cut_into_files

_BLOCK = 16 * 2**20


def config_of(layers: int, vocab: int) -> dict[str, Any]:
    """Qwen3-0.6B with other numbers of layers and words."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def make_model(path: Path, config: dict[str, Any]) -> int:
    """Write random weights in bfloat16; their bytes."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    entries = [Entry(name, torch.bfloat16, shape) for name, shape in table(config).shapes().items()]
    files = cut_into_files(entries, 500_000_000)
    file_of: dict[str, str] = {}
    for number, file in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        with ShardFile(path / name, file) as shard:
            for entry in file:
                numbers = torch.empty(entry.shape, dtype=torch.bfloat16)
                shard.write(numbers.view(torch.int16).random_(0, 0x3F80).view(torch.bfloat16))
                file_of[entry.name] = name
            shard.finish()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return sum(entry.nbytes for entry in entries)


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def drop(path: Path) -> None:
    """Take a folder's files out of the page cache."""
    os.sync()
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(path: Path) -> None:
    """Read a folder's files once."""
    buffer = bytearray(_BLOCK)
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def write_raw(path: Path, nbytes: int) -> None:
    """Write so many bytes to one file and bring them to the disk."""
    block = os.urandom(_BLOCK)
    with path.open("wb", buffering=0) as stream:
        for _ in range(nbytes // _BLOCK):
            stream.write(block)
        os.fsync(stream.fileno())
    path.unlink()


def rank_main(folder: Path, rank: int, ranks: int, port: int, is_cold: bool) -> None:
    """One rank: build the model, load it, export it; its figures as JSON on stdout."""
    # Megatron takes seconds to import, and the parent needs none of it.
    from miles_train.megatron import cpu_shim, runtime  # noqa: PLC0415
    from miles_train.megatron.arguments import parse_arguments  # noqa: PLC0415
    from miles_train.megatron.layout import check_layout  # noqa: PLC0415
    from miles_train.megatron.model_weights import ModelWeights  # noqa: PLC0415
    from miles_train.megatron.specs import SPECS, build_chunks  # noqa: PLC0415
    from miles_train.megatron.weights.load import Source  # noqa: PLC0415

    torch.set_num_threads(1)
    directory = open_model_directory(folder / "model")
    settings = {"lr": 1e-6, "bf16": True, "tensor_model_parallel_size": ranks}
    spec = SPECS[directory.architecture]
    layout = check_layout(settings, ranks, directory.config)
    cpu_shim.install()
    args = parse_arguments(settings, spec.arguments(directory.config), rank=rank, layout=layout, seed=0, on_gpu=False)
    runtime.start(args, runtime.Address(rank, ranks, "127.0.0.1", port), deterministic=False)
    with cpu_shim.active():
        chunks = build_chunks(spec, directory.config, args)
    share = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    largest = max(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    weights = ModelWeights(chunks, table_for(directory), Source(directory))
    result: dict[str, float] = {"share_bytes": share, "largest_tensor_bytes": largest}
    before = mark()
    torch.distributed.barrier()
    result["load_s"] = seconds(weights.load)
    result["load_peak_bytes"] = peak() - before
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        parameter.data.add_(0)
    torch.distributed.barrier()
    before = mark()
    result["export_s"] = seconds(lambda: weights.export(folder / ("cold" if is_cold else "warm")))
    result["export_peak_bytes"] = peak() - before
    runtime.stop()
    sys.stdout.write(json.dumps(result) + "\n")


def mark() -> int:
    """Set the kernel's mark of the process's peak back to what is resident, and give that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most that was resident since `mark`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def run_ranks(folder: Path, ranks: int, port: int, is_cold: bool) -> list[dict[str, float]]:
    """Figures of every rank."""
    if is_cold:
        drop(folder / "model")
    else:
        read_raw(folder / "model")
    command = [sys.executable, __file__, "--folder", str(folder), "--tensor", str(ranks), "--port", str(port)]
    command += ["--cold"] if is_cold else []
    started = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(ranks)
    ]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a rank failed: its error is above")
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


def rates(folder: Path, nbytes: int) -> dict[str, float]:
    """The disk's own, in GB/s."""
    drop(folder / "model")
    cold = seconds(lambda: read_raw(folder / "model"))
    warm = seconds(lambda: read_raw(folder / "model"))
    written = seconds(lambda: write_raw(folder / "raw", nbytes))
    return {
        "read_cold": nbytes / cold / 1e9,
        "read_warm": nbytes / warm / 1e9,
        "write_fsync": nbytes / written / 1e9,
    }


def main() -> None:
    """Time it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="on the disk to measure; a temporary one by default")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--tensor", type=int, default=1, help="ranks, tensor-parallel")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is not None:
        rank_main(asked.folder, asked.rank, asked.tensor, asked.port, asked.cold)
        return
    folder = Path(tempfile.mkdtemp(dir=asked.folder))
    try:
        nbytes = make_model(folder / "model", config_of(asked.layers, asked.vocab))
        result: dict[str, Any] = {"bytes": nbytes, "ranks": asked.tensor, "disk_gb_per_s": rates(folder, nbytes)}
        for number, name in enumerate(("cold", "warm")):
            figures = run_ranks(folder, asked.tensor, asked.port + number, name == "cold")
            result[name] = {
                "load_gb_per_s": nbytes / max(rank["load_s"] for rank in figures) / 1e9,
                "export_gb_per_s": nbytes / max(rank["export_s"] for rank in figures) / 1e9,
                "ranks": figures,
            }
        result["disk_gb_per_s_after"] = rates(folder, nbytes)
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
