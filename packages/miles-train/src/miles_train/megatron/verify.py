"""A trainer beside the reference of one model directory: one rank's part of `miles verify`, in any layout.

`miles_train.reference` has written what transformers computes; here the trainer's logits, its gradients and what it
exports are held against that, tensor by tensor.
"""

import resource
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from miles_core.types import Batch
from miles_train.comparison import (
    ExportChanges,
    Gap,
    export_changes,
    gradient_gap,
    logit_gaps,
    negative_log_likelihood,
)
from miles_train.megatron.runtime import Address
from miles_train.megatron.trainer import MegatronTrainer
from miles_train.megatron.weights.load import Decode, Source
from miles_train.megatron.weights.table import Region
from miles_train.model_dir import ModelDirectory, open_model_directory
from miles_train.reference_files import Reference

# Megatron wants one; nothing is updated.
_LEARNING_RATE = {"lr": 1e-6}


@dataclass(slots=True)
class Verified:
    """What one rank found; only the first looks.

    Attributes:
        logits: a gap for each sample.
        gradients: a gap for each stored tensor.
        without_gradient: stored tensors that only one of the two has a gradient of.
        export: what the export changed.
        load_s: seconds to build the model and load it.
        load_bytes: of this rank's tensors.
        export_s: seconds to write the export and read it back.
        export_bytes: of all files of weights.
        peak_bytes: most memory that the process has held.
    """

    logits: list[Gap] = field(default_factory=list)
    gradients: list[Gap] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    export: ExportChanges = field(default_factory=ExportChanges)
    load_s: float = 0.0
    load_bytes: int = 0
    export_s: float = 0.0
    export_bytes: int = 0
    peak_bytes: int = 0


def verify_rank(
    path: str | Path,
    megatron: Mapping[str, Any],
    folder: Path,
    batch: Batch,
    *,
    address: Address,
    family: str | None = None,
    decode: Decode | None = None,
    micro_batch_tokens: int = 16384,
) -> Verified:
    """Load a directory, export it, and compare; collective.

    Args:
        path: the model directory.
        megatron: `[train.megatron]`, in float32.
        folder: where the reference lies; `export` is written there.
        batch: what the reference was computed on.
        address: of this rank.
        family: as for `MegatronTrainer`.
        decode: as for `MegatronTrainer`.
        micro_batch_tokens: as for `MegatronTrainer`.

    Raises:
        InputError: the directory or the settings are wrong.
    """
    found = Verified()
    is_first = address.rank == 0
    started = time.perf_counter()

    def progress(done: int, total: int) -> None:
        found.load_bytes = total

    trainer = MegatronTrainer(
        path,
        {**_LEARNING_RATE, **megatron},
        negative_log_likelihood,
        address=address,
        family=family,
        micro_batch_tokens=micro_batch_tokens,
        decode=decode,
        progress=progress,
    )
    with closing(trainer):
        found.load_s = time.perf_counter() - started
        reference = Reference(folder)
        logits = trainer.logits(batch)
        if is_first:
            found.logits = logit_gaps(logits, reference.logits(), batch)
        del logits
        gradients = trainer.gradients(batch.take(range(trainer.shard, batch.num_samples, trainer.num_shards)))
        found.gradients, found.without_gradient = compare_gradients(gradients, reference, is_first)
        started = time.perf_counter()
        trainer.export(folder / "export")
        found.export_s = time.perf_counter() - started
    if is_first:
        source, exported = open_model_directory(path), open_model_directory(folder / "export")
        found.export = export_changes(source, exported, whole_reader(source, decode))
        found.export_bytes = sum(tensor.nbytes for tensor in exported.tensors.values())
    found.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def compare_gradients(
    ours: Iterable[tuple[str, Tensor]], reference: Reference, looks: bool = True
) -> tuple[list[Gap], list[str]]:
    """Compare gradients by stored name, one tensor at a time.

    Args:
        ours: names and gradients; every rank must take them all.
        reference: theirs.
        looks: whether this rank compares.

    Returns:
        A gap for each name; and names that have a gradient that is not 0 on one side, and none on the other.
    """
    gaps, alone, seen = [], [], set[str]()
    with reference.gradients() as theirs:
        for name, gradient in ours:
            if not looks:
                continue
            if name in theirs.names:
                seen.add(name)
                gaps.append(gradient_gap(name, gradient.cpu(), theirs.read(name), theirs.total_norm))
            elif gradient.any():
                alone.append(name)
        if looks:
            alone += [name for name in theirs.names if name not in seen and theirs.read(name).any()]
    return gaps, alone


def whole_reader(directory: ModelDirectory, decode: Decode | None) -> Any:
    """A function that gives a tensor of a directory by name, FP8 ones decoded."""
    source = Source(directory, decode)

    def read(name: str) -> Tensor:
        shape = directory.tensors[name].shape
        with source.part(Region(name, shape, (0,) * len(shape), shape)) as tensor:
            return tensor.clone()

    return read
