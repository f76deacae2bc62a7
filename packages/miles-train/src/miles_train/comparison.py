"""A model beside a reference: bounds on logits and gradients, and what an export changed. Needs torch alone.

Bounds are those that two float32 implementations of one model keep, and that a wrong one breaks by far.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_core.types import Batch, Floats
from miles_train.model_dir import ModelDirectory

LOGITS = 1e-4  # max |a - b| of a sample, as a share of max |b|
GRADIENTS = 1e-3  # ||a - b|| of a tensor, as a share of ||b||
# A gradient below this share of the norm over all tensors is 0 but for rounding (a router whose weights are always 1, a
# bias that softmax takes out): its difference is held against that norm instead of its own.
ZERO = 1e-6


def negative_log_likelihood(inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss whose gradients are compared: -log p of each token, [T]."""
    return -inputs.logprobs, {}


def probe_batch(vocab_size: int, longest: int, num_samples: int = 6, seed: int = 0) -> Batch:
    """Random tokens: samples from `longest` tokens down to two, all but the first of each trained.

    Args:
        vocab_size: tokens are below it.
        longest: tokens of the longest sample, at least 2.
        num_samples: of the batch.
        seed: of the tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = np.maximum(2, longest * 2.0 ** -np.arange(num_samples)).astype(np.int32)
    total = int(lengths.sum())
    mask = np.ones(total, np.bool_)
    mask[np.cumsum(lengths) - lengths] = False
    return Batch(
        tokens=rng.integers(0, vocab_size, total).astype(np.int32),
        lengths=lengths,
        loss_mask=mask,
        rollout_logprobs=np.zeros(total, np.float32),
        advantages=mask.astype(np.float32),
        loss_weights=(mask / mask.sum()).astype(np.float32),
        rewards=np.ones(num_samples, np.float32),
        versions=np.zeros(num_samples, np.int64),
        group_index=np.arange(num_samples, dtype=np.int32),
        num_loss_tokens=int(mask.sum()),
        num_samples=num_samples,
    )


@dataclass(frozen=True, slots=True)
class Gap:
    """How far something is from the reference.

    Attributes:
        name: of the tensor, or of the sample.
        value: the difference.
        bound: what it may be at most.
        kind: "relative", a share of the reference's own size; or "absolute", a share of the norm over all gradients.
    """

    name: str
    value: float
    bound: float
    kind: str = "relative"

    @property
    def holds(self) -> bool:
        """Whether it is within the bound; NaN is not."""
        return self.value <= self.bound


def logit_gaps(ours: Floats, theirs: Floats, batch: Batch) -> list[Gap]:
    """Largest |a - b| of each sample as a share of its largest |b|, over the logits [T, V] that predict its tokens."""
    gaps = []
    for number, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        a, b = ours[start + 1 : stop], theirs[start + 1 : stop]
        share = _share(np.abs(a - b).max(), np.abs(b).max())
        gaps.append(Gap(f"sample {number}, {stop - start} tokens", share, LOGITS))
    return gaps


def gradient_gap(name: str, ours: Tensor, theirs: Tensor, total_norm: float) -> Gap:
    """||a - b|| of a tensor as a share of ||b||, or of the norm over all tensors where b is 0 but for rounding.

    Args:
        name: of the tensor.
        ours: a.
        theirs: b.
        total_norm: of the reference's gradients together.
    """
    difference, norm = _norm(ours.float() - theirs.float()), _norm(theirs)
    if norm <= ZERO * total_norm:
        return Gap(name, _share(difference, total_norm), ZERO, "absolute")
    return Gap(name, difference / norm, GRADIENTS)


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else float(part)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


@dataclass(slots=True)
class ExportChanges:
    """What is not in an export as it was in the source.

    Attributes:
        missing: tensors that did not come back.
        extra: tensors that were not there.
        changed: tensors whose numbers differ.
        dtypes: "bfloat16 > float32" to how many tensors are stored so, their numbers all the same.
        decoded: how many FP8 tensors were written as plain numbers, equal to the decoded ones.
        files_missing: files that were not copied (but for weights, which may be sharded otherwise).
        config: keys of config.json with the values before and after.
        num_tensors: that were compared.
    """

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    dtypes: dict[str, int] = field(default_factory=dict)
    decoded: int = 0
    files_missing: list[str] = field(default_factory=list)
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    num_tensors: int = 0

    @property
    def holds(self) -> bool:
        """Whether every tensor came back, and no other."""
        return not (self.missing or self.extra or self.changed)


def export_changes(
    source: ModelDirectory, exported: ModelDirectory, read_source: Callable[[str], Tensor]
) -> ExportChanges:
    """Compare all tensors bit for bit, and what lies beside them.

    Numbers in a wider dtype than before count as the same if widening the old ones gives them bit for bit.

    Args:
        source: the directory that the model came from.
        exported: the one that was written.
        read_source: gives a tensor of the source, FP8 ones decoded.
    """
    changes = ExportChanges(
        missing=sorted(source.tensors.keys() - exported.tensors.keys()),
        extra=sorted(exported.tensors.keys() - source.tensors.keys()),
        config=_changed_keys(_config(source.path), _config(exported.path)),
    )
    scaled = {} if source.scales is None else source.scales.tensors
    with exported.reader() as read:
        for name in sorted(source.tensors.keys() & exported.tensors.keys()):
            before, after = read_source(name), read(name)
            changes.num_tensors += 1
            if before.shape != after.shape or not _same_bits(before.to(after.dtype), after):
                changes.changed.append(name)
            elif name in scaled:
                changes.decoded += 1
            elif before.dtype != after.dtype:
                if not _same_bits(before, after.to(before.dtype)):
                    changes.changed.append(name)
                key = f"{before.dtype} > {after.dtype}".replace("torch.", "")
                changes.dtypes[key] = changes.dtypes.get(key, 0) + 1
    changes.files_missing = sorted(_others(source.path) - _others(exported.path))
    return changes


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def _changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _others(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if file.is_file() and ".safetensors" not in file.name}
