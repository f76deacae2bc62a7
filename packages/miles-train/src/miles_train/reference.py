"""The reference: a model directory as transformers computes it, in float32 with eager attention.

A process of its own runs this, and gives its memory back before the trainer's model is loaded.
"""

import json
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_core.types import Batch, Floats
from miles_train.model_dir import ModelDirectory, open_model_directory
from miles_train.reference_files import GRADIENTS, LOGITS, SUMMARY

try:
    import transformers
    from transformers import AutoModelForCausalLM, PreTrainedModel
except ImportError as error:
    raise ImportError(
        f'the reference needs transformers: {error}. Install it with pip install "transformers>=5".'
    ) from error

# Where a directory's text model lies behind a prefix in a class that transformers does not have, its own class.
_PREFIX = "language_model."


def write_reference(path: str | Path, batch: Batch, folder: Path) -> None:
    """Compute logits and gradients of a directory, and write them to `folder`, where `Reference` finds them.

    Raises:
        InputError: transformers cannot load or run the directory.
    """
    started = time.perf_counter()
    directory = open_model_directory(path)
    model, unused = load_reference(directory)
    try:
        logits = reference_logits(model, batch)
    except Exception as error:  # a model's own code may raise anything
        raise _cannot(directory, "run", error) from error
    np.save(folder / LOGITS, logits)
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters() if p.grad is not None]
    write_gradients(model, folder / GRADIENTS)
    summary = {
        "class": type(model).__name__,
        "version": transformers.__version__,
        "unused": unused,
        "gradient_norm": float(torch.stack(norms).norm()),
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (folder / SUMMARY).write_text(json.dumps(summary), encoding="utf-8")


def load_reference(directory: ModelDirectory) -> tuple[PreTrainedModel, list[str]]:
    """Load a directory in float32.

    Returns:
        The model, and stored tensors that it does not use.

    Raises:
        InputError: transformers does not know the model, or does not find all its weights.
    """
    options: dict[str, Any] = {
        "attn_implementation": "eager",
        "dtype": torch.float32,
        "output_loading_info": True,
        "local_files_only": True,
    }
    if directory.scales is not None:
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    with _loadable(directory) as (path, cls, prefix):
        try:
            if prefix:
                options["key_mapping"] = {f"^{prefix}": ""}
            # The other kinds of experts refuse sizes that are no multiples of 16 bytes.
            model, info = cls.from_pretrained(path, experts_implementation="eager", **options)
        except Exception as error:  # whatever its loading may raise
            raise _cannot(directory, "load", error) from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise InputError(
            f"tensors of {directory.path}",
            f"without {', '.join(missing[:4])}",
            f"{type(model).__name__} of transformers {transformers.__version__} needs them",
            "Save or download the model again.",
        )
    return model.eval(), sorted(map(str, info["unexpected_keys"]))


@contextmanager
def _loadable(directory: ModelDirectory) -> Iterator[tuple[str, Any, str]]:
    """What transformers is given: a directory and a class, and the prefix of the text model within it.

    A class that transformers does not have, around a text model that it does (Kimi K2.5), is left out: that model is
    loaded with its own config, its tensors found behind the prefix.
    """
    cls = getattr(transformers, directory.architecture, None)
    if cls is not None:
        yield str(directory.path), cls, ""
        return
    text = directory.config.get("text_config")
    behind = any(name.startswith(_PREFIX) for name in directory.tensors)
    if not (isinstance(text, Mapping) and behind and isinstance(text.get("architectures"), list)):
        yield str(directory.path), AutoModelForCausalLM, ""
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in directory.path.resolve().iterdir():
            if ".safetensors" in file.name:
                Path(folder, file.name).symlink_to(file)
        Path(folder, "config.json").write_text(json.dumps(text), encoding="utf-8")
        yield folder, getattr(transformers, text["architectures"][0], AutoModelForCausalLM), _PREFIX


def _cannot(directory: ModelDirectory, do: str, error: Exception) -> InputError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return InputError(
        f"architectures in {directory.path / 'config.json'}",
        directory.architecture,
        f"transformers {transformers.__version__} cannot {do} it ({type(error).__name__}: {reason})",
        "Install a version that can, or compare with a reference of your own.",
    )


def reference_logits(model: PreTrainedModel, batch: Batch) -> Floats:
    """Run the samples one by one, leaving in the parameters the gradients of the batch's mean -log p.

    Returns:
        Logits that predict each token, float32 [T, V]; 0 for the first token of each sample.
    """
    rows = []
    for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        tokens = torch.from_numpy(batch.tokens[start:stop]).long()
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].float()
        weights = torch.from_numpy(batch.loss_weights[start + 1 : stop])
        nll = -logits[:-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        (weights * nll).sum().backward()
        logits = logits.detach()
        rows.append(torch.cat([torch.zeros_like(logits[:1]), logits[:-1]]))
    return np.ascontiguousarray(torch.cat(rows).numpy())


def write_gradients(model: PreTrainedModel, folder: Path) -> None:
    """Write gradients under the names that tensors are stored by: in memory experts are stacked, among others.

    What took none (a frozen parameter, one that the loss does not reach) is written as zeros.
    """
    gradients: dict[str, Tensor] = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    # Config and dtype are saved as well: the folder is a model directory.
    model.save_pretrained(folder, state_dict=gradients)
