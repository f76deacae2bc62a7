"""A Hugging Face model directory, read without transformers: its config and where its tensors lie.

Only headers are read here. Every complaint about a directory comes from this module or from the weight table it is
compared with, before any weight is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miles_core.errors import InputError
from miles_train.tensor_files import MappedFiles, StoredTensor

__all__ = ["INDEX", "SCALE", "BlockScales", "ModelDirectory", "StoredTensor", "open_model_directory"]

INDEX = "model.safetensors.index.json"
_SETTING = "model.path"
# Appended to the name of an FP8 weight, it names the factors of its blocks.
SCALE = "_scale_inv"
# A header longer than this is not a header (the format's own limit, in bytes).
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class BlockScales:
    """FP8 weights of a directory: each is e4m3 with one factor for each block of its last two dims.

    Attributes:
        block: rows and columns of a block.
        tensors: the factors by the name of the weight. They are multiplied with, whatever `scale_inv` says.
    """

    block: tuple[int, int]
    tensors: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, eq=False)
class ModelDirectory:
    """A checked directory.

    Attributes:
        path: the directory.
        config: config.json without `quantization_config`.
        tensors: every stored tensor by name, scales apart.
        scales: of FP8 weights; None where the directory has none.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    scales: BlockScales | None = field(default=None)

    @property
    def architecture(self) -> str:
        """The class that config.json names, e.g. "Qwen3ForCausalLM"."""
        return self.config["architectures"][0]

    def reader(self) -> MappedFiles:
        """What reads tensors by name; scales are read under the weight's name with `_scale_inv`."""
        scales = {} if self.scales is None else self.scales.tensors
        return MappedFiles({**self.tensors, **{name + SCALE: stored for name, stored in scales.items()}})


def open_model_directory(path: str | Path) -> ModelDirectory:
    """Read config.json and the headers of all safetensors files.

    Args:
        path: directory with config.json and model.safetensors, or shards and model.safetensors.index.json.

    Raises:
        InputError: the directory or a file is missing, a file is truncated or not what its name says, or the index
            and the shards disagree.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(_SETTING, str(path), "no such directory", "Name a local Hugging Face model directory.")
    config = _read_json(path / "config.json", "a Hugging Face model directory has one")
    names = config.get("architectures")
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise InputError(
            str(path / "config.json"),
            names,
            "`architectures` must name exactly one class",
            'Write for example "architectures": ["Qwen3ForCausalLM"].',
        )
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        for name, stored in _read_header(file).items():
            if name in tensors:
                raise InputError(
                    str(file), name, f"stored in {tensors[name].file.name} already", "Store each tensor once."
                )
            tensors[name] = stored
    _check_index(path, tensors)
    block = _take_quantization(path, config)
    if block is None:
        return ModelDirectory(path, config, tensors)
    weights, scales = _apart(tensors)
    return ModelDirectory(path, config, weights, BlockScales(block, scales))


def _take_quantization(path: Path, config: dict[str, Any]) -> tuple[int, int] | None:
    """Take `quantization_config` out of a config; the size of an FP8 block, or None if weights are plain numbers."""
    found = config.pop("quantization_config", None)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
        inner = config["text_config"].pop("quantization_config", None)
        found = inner if found is None else found
    if found is None:
        return None
    block = found.get("weight_block_size") if isinstance(found, dict) else None
    is_pair = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    if block is None or not is_pair or found.get("quant_method") != "fp8" or found.get("fmt", "e4m3") != "e4m3":
        raise InputError(
            f"quantization_config in {path / 'config.json'}",
            found,
            'weights must be plain, or "quant_method": "fp8" with "fmt": "e4m3" and two numbers as "weight_block_size"',
            "Take the unquantised model, or dequantise this one and save it in bfloat16.",
        )
    return block[0], block[1]


def _apart(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors proper, and the scales by the name of the weight that they belong to."""
    scales = {name: tensors[name + SCALE] for name in tensors if name + SCALE in tensors}
    names = {name + SCALE for name in scales}
    return {name: stored for name, stored in tensors.items() if name not in names}, scales


def _weight_files(path: Path) -> list[Path]:
    index = path / INDEX
    if index.exists():
        weight_map = _read_json(index, "the directory is sharded").get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(str(index), weight_map, "`weight_map` must be an object", "Save the model again.")
        files = [path / file for file in sorted(set(weight_map.values()))]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            rule = f"the index {INDEX} names it" if index.exists() else f"there is no {INDEX} either"
            raise InputError(_SETTING, str(file), f"no such file, and {rule}", "Save or download the model again.")
    return files


def _check_index(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    index = path / INDEX
    if not index.exists():
        return
    for name, file in _read_json(index, "the directory is sharded")["weight_map"].items():
        if name not in tensors or tensors[name].file.name != file:
            raise InputError(str(index), name, f"not stored in {file}", "Save or download the model again.")


def _read_json(file: Path, why: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(_SETTING, str(file), f"no such file, and {why}", "Name a complete directory.") from None
    except (OSError, ValueError) as error:
        raise InputError(_SETTING, str(file), f"cannot be read ({error})", "Save the model again.") from None
    if not isinstance(value, dict):
        raise InputError(_SETTING, str(file), "must hold a JSON object", "Save the model again.")
    return value


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Parse the header of a safetensors file and hold the file's size against it.

    The format: 8 bytes little-endian length, that many bytes of JSON, then the data
    (https://huggingface.co/docs/safetensors, "Format").
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _truncated(file, size)
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise _truncated(file, size) from None
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise _truncated(file, size, end)
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _truncated(file: Path, size: int, expected: int | None = None) -> InputError:
    rule = f"must be {expected} bytes by its header" if expected else "is not a complete safetensors file"
    return InputError(str(file), f"{size} bytes", rule, "It was cut short or damaged: save or download it again.")
