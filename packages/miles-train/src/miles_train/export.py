"""What stands beside the weights in an exported Hugging Face directory: index, config, tokenizer files."""

import fnmatch
import json
import shutil
from collections.abc import Mapping, Set
from pathlib import Path

import torch

from miles_core.errors import InputError
from miles_train.model_dir import INDEX, ModelDirectory, open_model_directory

# What transformers takes by default: files that any tool can load and any hub accepts, in bytes.
MAX_SHARD_BYTES = 5 * 10**9
_COPIED = (
    "tokenizer*",
    "*.model",
    "tiktoken*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def is_model_directory(path: Path) -> bool:
    """Whether a complete model directory lies there, which an export may replace."""
    try:
        open_model_directory(path)
    except InputError:
        return False
    return True


def write_rest(
    folder: Path, source: ModelDirectory, file_of: Mapping[str, str], nbytes: int, dtypes: Set[torch.dtype]
) -> None:
    """Write everything but the weights.

    Args:
        folder: that holds the weights.
        source: where config.json and the tokenizer's files come from.
        file_of: the file of each tensor.
        nbytes: of all tensors.
        dtypes: of the trained tensors; where there is one it becomes the config's, where there are several (some rows
            stay in float32) the narrowest does.

    Raises:
        OSError: they cannot be written.
    """
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(file_of.items()))}
        _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", _config(source, dtypes))
    for file in sorted(source.path.iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in _COPIED):
            shutil.copyfile(file, folder / file.name)


def _config(source: ModelDirectory, dtypes: Set[torch.dtype]) -> dict[str, object]:
    config = dict(source.config)
    if dtypes:
        narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
        # transformers 4 wrote torch_dtype, 5 writes dtype.
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        config[key] = str(narrowest).removeprefix("torch.")
    return config


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
