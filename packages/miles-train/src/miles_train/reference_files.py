"""What `miles_train.reference` leaves behind, readable without transformers."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from miles_core.types import Floats
from miles_train.model_dir import open_model_directory
from miles_train.tensor_files import MappedFiles

LOGITS, GRADIENTS, SUMMARY = "logits.npy", "gradients", "reference.json"


@dataclass(frozen=True, slots=True)
class Gradients:
    """The reference's gradients.

    Attributes:
        names: stored tensors that have one, maybe of zeros.
        total_norm: over all of them.
    """

    names: Collection[str]
    total_norm: float
    _files: MappedFiles

    def read(self, name: str) -> Tensor:
        """One of them, float32; a view of its file."""
        return self._files(name)


class Reference:
    """The files in a folder."""

    def __init__(self, folder: Path):
        """Nothing is read yet."""
        self._folder = folder

    def summary(self) -> dict[str, Any]:
        """Class and version of the reference, what it left unused, the norm of its gradients, seconds and bytes."""
        return json.loads((self._folder / SUMMARY).read_text(encoding="utf-8"))

    def logits(self) -> Floats:
        """Logits that predict each token, [T, V]; 0 for the first token of each sample."""
        return np.load(self._folder / LOGITS, mmap_mode="r")

    @contextmanager
    def gradients(self) -> Iterator[Gradients]:
        """Map the gradients' files."""
        directory = open_model_directory(self._folder / GRADIENTS)
        with directory.reader() as files:
            yield Gradients(directory.tensors.keys(), self.summary()["gradient_norm"], files)
