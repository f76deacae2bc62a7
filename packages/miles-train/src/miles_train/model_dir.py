"""A Hugging Face model directory, read without transformers: its config and where its tensors lie.

Only headers are read here. Every complaint about a directory comes from this module or from the weight table it is
compared with, before any weight is loaded.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from miles_core.errors import InputError

INDEX = "model.safetensors.index.json"
_SETTING = "model.path"
# A header longer than this is not a header (the format's own limit, in bytes).
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor of a directory lies.

    Attributes:
        file: the safetensors file.
        dtype: in safetensors' spelling, e.g. "F32" or "BF16".
        shape: as stored.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ModelDirectory:
    """A checked directory.

    Attributes:
        path: the directory.
        config: config.json.
        tensors: every stored tensor by name.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """The class that config.json names, e.g. "Qwen3ForCausalLM"."""
        return self.config["architectures"][0]

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        """Give a function that reads one tensor by name; each file is mapped into memory once, never read whole."""
        with ExitStack() as files:
            opened: dict[Path, Any] = {}

            def read(name: str) -> Tensor:
                file = self.tensors[name].file
                if file not in opened:
                    opened[file] = files.enter_context(safe_open(file, framework="pt"))
                return opened[file].get_tensor(name)

            yield read


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
    return ModelDirectory(path, config, tensors)


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
    return {name: StoredTensor(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _truncated(file: Path, size: int, expected: int | None = None) -> InputError:
    rule = f"must be {expected} bytes by its header" if expected else "is not a complete safetensors file"
    return InputError(str(file), f"{size} bytes", rule, "It was cut short or damaged: save or download it again.")
