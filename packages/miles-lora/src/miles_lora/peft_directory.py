"""Adapters as the directories of the peft library: `adapter_config.json` and `adapter_model.safetensors`.

The tensors are those of `adapter_state`, each name behind `base_model.model.`, in the dtype of the parameters. With the
same tensors the file is, byte for byte, the one that peft writes. A directory appears whole or not at all: it is
written under another name beside its place, flushed to disk and renamed.

What the config may say is read strictly. A key that this package does not implement (DoRA, biases, ranks per module,
...) must have the value that switches it off; a key it has never heard of, likewise.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from miles_lora.config import LoraConfig
from miles_lora.errors import LoraError
from miles_lora.model import adapter_config, adapter_state, attach, detach, load_adapter_state

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the name of a module of the base model."""

_FIELDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "target_modules": "targets",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "base_model_name_or_path": "base_model",
    "task_type": "task_type",
}
"""Keys of the file that have a field of `LoraConfig`."""

_WITHOUT_EFFECT = {
    "auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
}  # fmt: skip
"""Keys whose value changes nothing about a loaded adapter (megatron_core and qalora_group_size: only together with keys
that are refused)."""

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base weights alone. The others subtract the adapter's start from them."""


def save_peft(model: nn.Module, directory: str | Path) -> None:
    """Write the model's adapter as a new PEFT directory, its parents included.

    A process that is killed in the middle leaves a hidden `.<name>.<random>` beside it, which may be removed.

    Raises:
        LoraError: There is no adapter, or something is at `directory` already: an adapter that others may be reading is
            not overwritten.
        OSError: The disk is full or may not be written. Nothing is left behind.
    """
    directory = Path(directory)
    config = json.dumps(_to_peft(adapter_config(model)), indent=2, sort_keys=True)
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter_state(model).items()}
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        # Not save_file: it makes the file unreadable for other users, an engine's among them.
        (staging / TENSORS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
        (staging / CONFIG_FILE).write_text(config)
        for path in (staging / TENSORS_FILE, staging / CONFIG_FILE, staging):
            _flush(path)
        _rename(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _flush(directory.parent)


def load_peft(model: nn.Module, directory: str | Path, *, dtype: torch.dtype | None = None) -> LoraConfig:
    """Attach the adapter of a PEFT directory to a model that has none.

    Args:
        model: The base model, as it was when the adapter was made.
        directory: With `adapter_config.json` and `adapter_model.safetensors`.
        dtype: Of A and B; None keeps the file's. To train on from a bfloat16 file, take float32.

    Returns:
        The config it was attached with.

    Raises:
        LoraError: A file is missing or damaged; the config asks for something this package does not do; targets, names
            or shapes do not fit the model. The model is as before.
    """
    config = _read_config(Path(directory))
    tensors = _read_tensors(Path(directory))
    if dtype is None:
        dtypes = {tensor.dtype for tensor in tensors.values()}
        if len(dtypes) != 1:
            raise LoraError(f"{directory}/{TENSORS_FILE} mixes {sorted(map(str, dtypes))}: say which `dtype` to use")
        dtype = dtypes.pop()
    attach(model, config, dtype=dtype)
    try:
        load_adapter_state(model, tensors)
    except LoraError as error:
        detach(model)
        raise LoraError(f"{directory}: {error}") from error
    return config


def _to_peft(config: LoraConfig) -> dict[str, Any]:
    values = {key: getattr(config, field) for key, field in _FIELDS.items()}
    if not isinstance(config.targets, str):
        values["target_modules"] = list(config.targets)
    if float(config.alpha).is_integer():
        values["lora_alpha"] = int(config.alpha)
    fixed = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "inference_mode": True}
    return {**values, **fixed, "init_lora_weights": True}


def _read_config(directory: Path) -> LoraConfig:
    path = directory / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LoraError(f"{path} cannot be read ({error}): it must be the JSON that peft or save_peft wrote") from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise LoraError(f"{path} is not a LoRA adapter: peft_type must be 'LORA'")
    for key, value in sorted(values.items()):
        if key == "init_lora_weights" and value not in _PLAIN_STARTS:
            raise LoraError(
                f"{path} says init_lora_weights={value!r}, which changes the base weights: convert the adapter with "
                "peft (save_pretrained with path_initial_model_for_weight_conversion)"
            )
        if key not in {*_FIELDS, *_WITHOUT_EFFECT, "init_lora_weights"} and value and value != "none":
            raise LoraError(f"{path} says {key}={value!r}, which is not supported: only plain LoRA on linears is")
    if lacking := [key for key in ("r", "lora_alpha", "target_modules") if not values.get(key)]:
        raise LoraError(f"{path} lacks {', '.join(lacking)}: without it the adapter is not determined")
    try:
        return LoraConfig(**{field: values[key] for key, field in _FIELDS.items() if key in values})
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoraError(
            f"{path} cannot be read ({error}): it must be a whole safetensors file; pickled adapters are not read"
        ) from error
    if strange := sorted(name for name in tensors if not name.startswith(PREFIX)):
        raise LoraError(f"{path} has a tensor {strange[0]!r}: names start with {PREFIX!r}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _rename(staging: Path, directory: Path) -> None:
    try:
        staging.rename(directory)
    except OSError as error:
        if directory.exists():
            raise LoraError(f"{directory} exists: save to a new place, or remove it first") from error
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
