"""One table per architecture says how Hugging Face tensors and Megatron parameters answer to each other.

A row reads: these Hugging Face tensors, fused in this way, are that Megatron parameter, cut along that dim under tensor
parallelism. Loading, export, weight sync and adapters all read the same rows, and a table is checked both ways against
a directory and a model: nothing may be left over on either side.

Nothing here imports Megatron: a driver checks a directory against a table before any process starts.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_train.model_dir import ModelDirectory

Shape = tuple[int, ...]


class Fusion(Protocol):
    """How several tensors lie in one parameter. `split(join(parts))` returns the parts bit for bit."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter made of the parts."""
        ...

    def split(self, whole: Tensor) -> list[Tensor]:
        """The parts of the parameter, in the order of the row's names. May be views."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor, as it is."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor."""
        (part,) = parts
        return part

    def split(self, whole: Tensor) -> list[Tensor]:
        """The tensor."""
        return [whole]


@dataclass(frozen=True, slots=True)
class Stacked:
    """`num_parts` equal parts one below the other along dim 0: gate and up of a gated MLP."""

    num_parts: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate along dim 0."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Views of the parts."""
        return list(whole.chunk(self.num_parts))


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """Query, key and value interleaved by groups, as Megatron's `linear_qkv` wants them.

    For each key-value head: its query heads, then the key head, then the value head (megatron/core/transformer/
    attention.py, `SelfAttention.get_query_key_value_tensors`). Works for weights [heads * head_dim, hidden] and biases.
    """

    num_heads: int
    num_groups: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Interleave q [heads * head_dim, ...], k and v [groups * head_dim, ...]."""
        grouped = [part.reshape(self.num_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(self, whole: Tensor) -> list[Tensor]:
        """Copies of q, k and v in Hugging Face's order."""
        queries = self.num_heads // self.num_groups * self.head_dim
        grouped = whole.view(self.num_groups, queries + 2 * self.head_dim, *whole.shape[1:])
        parts = grouped.split([queries, self.head_dim, self.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True, slots=True)
class Row:
    """Some Hugging Face tensors are one Megatron parameter.

    Attributes:
        hf: names in the checkpoint, in the order of the fusion. `{layer}` stands for the layer's index.
        shapes: their shapes.
        megatron: name of the parameter; `{layer}` as above.
        fusion: how the parts lie in the parameter.
        shard_dim: dim of the parameter that tensor parallelism cuts; None if every rank holds all of it.
        padded: True where Megatron may append rows to dim 0 (the vocabulary); they are zeros and never leave the
            trainer.
    """

    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    megatron: str
    fusion: Fusion = field(default_factory=Whole)
    shard_dim: int | None = None
    padded: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one parameter in each layer."""
        return "{layer}" in self.megatron

    def at(self, layer: int) -> "Row":
        """The row of one layer."""
        hf = tuple(name.format(layer=layer) for name in self.hf)
        return Row(hf, self.shapes, self.megatron.format(layer=layer), self.fusion, self.shard_dim, self.padded)


@dataclass(frozen=True, slots=True)
class WeightTable:
    """All rows of one model.

    Attributes:
        rows: patterns, per layer or not.
        num_layers: how many layers the per-layer rows stand for.
        tied: Hugging Face names that repeat another tensor (an output head tied to the embedding), name to original.
            Such a tensor may be stored or not; where it is, it must equal the original and is exported again.
    """

    rows: tuple[Row, ...]
    num_layers: int
    tied: Mapping[str, str] = field(default_factory=dict)

    def expand(self) -> Iterator[Row]:
        """One row for each Megatron parameter, layers in order."""
        for row in self.rows:
            if not row.per_layer:
                yield row
        for layer in range(self.num_layers):
            yield from (row.at(layer) for row in self.rows if row.per_layer)

    def shapes(self) -> dict[str, Shape]:
        """Every Hugging Face tensor the model needs, with its shape."""
        return {name: shape for row in self.expand() for name, shape in zip(row.hf, row.shapes, strict=True)}

    def check_directory(self, directory: ModelDirectory) -> None:
        """Hold a directory's tensors against the table.

        Raises:
            InputError: tensors are missing, left over (both remainders are listed, with the nearest names), or of
                another shape.
        """
        shapes = self.shapes()
        stored = {name for name in directory.tensors if name not in self.tied}
        _check_names(
            f"tensors of {directory.path}",
            f"the weight table of {directory.architecture}",
            stored,
            shapes,
        )
        original = {name: shapes[other] for name, other in self.tied.items() if name in directory.tensors}
        for name, shape in {**shapes, **original}.items():
            found = directory.tensors[name].shape
            if found != shape:
                raise InputError(
                    f"shape of {name} in {directory.path}",
                    found,
                    f"config.json makes it {shape}",
                    "The weights and config.json belong to different models: save the model again.",
                )

    def check_model(self, parameters: Iterable[str]) -> None:
        """Hold a Megatron model's parameter names against the table; both remainders go into the error.

        Raises:
            InputError: a parameter without a row or a row without a parameter.
        """
        _check_names(
            "parameters of the Megatron model",
            "the weight table",
            set(parameters),
            {row.megatron: () for row in self.expand()},
        )


def _check_names(what: str, table: str, found: set[str], expected: Mapping[str, object]) -> None:
    missing = [name for name in expected if name not in found]
    extra = sorted(name for name in found if name not in expected)
    if not missing and not extra:
        return
    lines = [f"missing: {_with_nearest(missing, extra)}"] if missing else []
    lines += [f"not in the table: {_with_nearest(extra, missing or list(expected))}"] if extra else []
    raise InputError(
        what,
        f"{len(found)} names",
        f"must be exactly those of {table}; " + "; ".join(lines),
        "Use a directory saved by transformers for this architecture, or extend the table.",
    )


def _with_nearest(names: list[str], others: Sequence[str], limit: int = 8) -> str:
    shown: list[str] = []
    for name in names[:limit]:
        near = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
