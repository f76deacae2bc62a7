"""Writes a Hugging Face directory from named tensors: streamed, read back, and only then given its name."""

import fnmatch
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from miles_core.errors import InputError
from miles_train import folders
from miles_train.errors import CheckpointError
from miles_train.model_dir import INDEX, ModelDirectory, open_model_directory

# What transformers takes by default: files that any tool can load and any hub accepts, in bytes.
MAX_SHARD_BYTES = 5 * 10**9
_COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)

Weights = Iterable[tuple[str, Tensor]]


def export_directory(
    path: Path, source: ModelDirectory, weights: Callable[[], Weights], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config, tokenizer files and weights; memory of one shard is used.

    Args:
        path: directory to make. A complete model directory that is there is replaced; anything else is not.
        source: where config.json and the tokenizer's files come from. Its dtype becomes that of the weights.
        weights: gives name and tensor of every weight, in the same order each time it is called: once to plan, once to
            write, once to compare.
        max_shard_bytes: a shard is closed before it grows beyond this.

    Raises:
        CheckpointError: it could not be written, or did not read back bit for bit; nothing is at `path` then.
    """
    try:
        partial = folders.begin(path, replaces=_is_model_directory)
        shards = _plan(weights(), max_shard_bytes)
        _write_shards(partial, shards, weights())
        dtypes = {tensor.dtype for _, tensor in weights()}
        _write_config(partial, source, dtypes)
        _copy_files(partial, source.path)
        _compare(partial, weights())
        folders.publish(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"export {path} could not be written: {error}. The directory must be new or hold an older export, and its "
            "disk be writable and have room."
        ) from error


def _is_model_directory(path: Path) -> bool:
    try:
        open_model_directory(path)
    except InputError:
        return False
    return True


def _plan(weights: Weights, max_shard_bytes: int) -> dict[str, str]:
    """The file of each tensor."""
    shard, size, shard_of = 0, 0, dict[str, int]()
    for name, tensor in weights:
        if size and size + tensor.nbytes > max_shard_bytes:
            shard, size = shard + 1, 0
        size += tensor.nbytes
        shard_of[name] = shard
    if shard == 0:
        return dict.fromkeys(shard_of, "model.safetensors")
    return {name: f"model-{index + 1:05}-of-{shard + 1:05}.safetensors" for name, index in shard_of.items()}


def _write_shards(partial: Path, shards: Mapping[str, str], weights: Weights) -> None:
    held: dict[str, Tensor] = {}
    total, current = 0, ""
    for name, tensor in weights:
        if held and shards[name] != current:
            save_file(held, partial / current, metadata={"format": "pt"})
            held = {}
        current = shards[name]
        # A copy: safetensors refuses tensors that share memory, as tied ones and views of a fused parameter do.
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        total += tensor.nbytes
    save_file(held, partial / current, metadata={"format": "pt"})
    if current != "model.safetensors":
        index = {"metadata": {"total_size": total}, "weight_map": dict(shards)}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(partial: Path, source: ModelDirectory, dtypes: set[torch.dtype]) -> None:
    config = dict(source.config)
    if len(dtypes) == 1:
        # transformers 4 wrote torch_dtype, 5 writes dtype.
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = str(dtypes.pop()).removeprefix("torch.")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_files(partial: Path, source: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in _COPIED):
            shutil.copyfile(file, partial / file.name)


def _compare(partial: Path, weights: Weights) -> None:
    """Hold what lies on disk against the weights, bit for bit."""
    written = open_model_directory(partial)
    missing = set(written.tensors)
    with written.reader() as read:
        for name, tensor in weights:
            missing.discard(name)
            on_disk, live = read(name), tensor.detach().cpu()
            if on_disk.dtype != live.dtype or not torch.equal(on_disk, live):
                raise CheckpointError(f"export of {name} did not read back as it was written: the disk may be failing.")
    if missing:
        raise CheckpointError(f"export holds tensors that are no weights: {sorted(missing)[:8]}.")
