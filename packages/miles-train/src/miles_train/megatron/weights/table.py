"""One table per architecture says how Hugging Face tensors and Megatron parameters answer to each other.

A row reads: these Hugging Face tensors, fused in this way, are that Megatron parameter, cut along that dim under tensor
parallelism. Loading, export, weight sync and adapters all read the same rows, and a table is checked both ways against
a directory and a model: nothing may be left over on either side.

Nothing here imports Megatron: a driver checks a directory against a table before any process starts.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_train.model_dir import ModelDirectory

Shape = tuple[int, ...]


class Fusion(Protocol):
    """How several tensors lie in one parameter. `split(join(parts))` returns the parts bit for bit."""

    def sharded(self, num_shards: int) -> "Fusion":
        """The same fusion for one tensor-parallel rank, whose parts are cut along the row's shard_dim."""
        ...

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The parameter made of the parts."""
        ...

    def split(self, whole: Tensor) -> list[Tensor]:
        """The parts of the parameter, in the order of the row's names. May be views."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """One tensor, as it is."""

    def sharded(self, num_shards: int) -> "Fusion":
        """Itself: it does not depend on sizes."""
        return self

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

    def sharded(self, num_shards: int) -> "Fusion":
        """Itself: it does not depend on sizes."""
        return self

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate along dim 0."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Views of the parts."""
        return list(whole.chunk(self.num_parts))


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Parts of different lengths one below the other along dim 0."""

    lengths: tuple[int, ...]

    def sharded(self, num_shards: int) -> "Concatenated":
        """With the lengths of one rank."""
        return Concatenated(tuple(length // num_shards for length in self.lengths))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Concatenate along dim 0."""
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        """Views of the parts."""
        return list(whole.split(list(self.lengths)))


@dataclass(frozen=True, slots=True)
class GroupedQKV:
    """Query, key and value interleaved by groups, as Megatron's `linear_qkv` wants them.

    For each key-value head: its query heads, then the key head, then the value head (megatron/core/transformer/
    attention.py, `SelfAttention.get_query_key_value_tensors`). Works for weights [heads * head_dim, hidden] and biases.
    """

    num_heads: int
    num_groups: int
    head_dim: int

    def sharded(self, num_shards: int) -> "GroupedQKV":
        """With the heads of one rank: whole groups."""
        if self.num_groups % num_shards:
            raise InputError(
                "train.megatron.tensor_model_parallel_size",
                num_shards,
                f"must divide num_key_value_heads = {self.num_groups}",
                "Choose a size that does.",
            )
        return GroupedQKV(self.num_heads // num_shards, self.num_groups // num_shards, self.head_dim)

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
class Region:
    """A box of a stored tensor: what one rank reads of it, and what it writes back.

    Attributes:
        name: the Hugging Face tensor.
        shape: of the whole stored tensor.
        start: first index along each dim.
        size: extent along each dim; a dim of it may be 0 (a rank whose rows of the vocabulary are padding alone).
        is_stacked: whether dim 0 counts experts: its extent is then 1, and the part has no such dim.
    """

    name: str
    shape: Shape
    start: Shape
    size: Shape
    is_stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Some Hugging Face tensors are one Megatron parameter.

    A part is one tensor of the checkpoint; or, where the checkpoint stacks experts, one expert of it; or, where it
    fuses on its own, some rows of it.

    Attributes:
        hf: tensor that each part lies in, in the order of the fusion. `{layer}` and `{expert}` stand for indices. A
            name without `{expert}` in a row with experts is a tensor that stacks them along dim 0.
        shapes: of the parts (of one expert, without the stacked dim).
        megatron: name of the parameter, placeholders as above. Names are those of an unsharded model: layers and
            experts are counted over the whole model, experts are called `local_experts.{expert}` as in `SequentialMLP`.
        fusion: how the parts lie in the parameter.
        shard_dim: dim of every part that tensor parallelism cuts; None if every rank holds all of it. Expert rows are
            cut by expert tensor parallelism.
        padded: True where Megatron may append rows to dim 0 (the vocabulary); they are zeros and never leave the
            trainer.
        layers: which layers a row with `{layer}` stands for; None for all of them.
        num_experts: how many experts a row with `{expert}` stands for.
        starts: first row (dim 0) of each part in its tensor, where one tensor holds several parts; None where every
            part is a tensor.
        fp32: whether the parameter stays in float32, whatever the model's dtype.
    """

    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    megatron: str
    fusion: Fusion = field(default_factory=Whole)
    shard_dim: int | None = None
    padded: bool = False
    layers: tuple[int, ...] | None = None
    num_experts: int = 0
    starts: tuple[int, ...] | None = None
    fp32: bool = False
    expert: int | None = None  # of an expanded row

    @property
    def per_layer(self) -> bool:
        """Whether the row stands for one parameter in each layer."""
        return "{layer}" in self.megatron

    @property
    def is_expert(self) -> bool:
        """Whether the parameter belongs to one expert (of many; shared experts are none)."""
        return self.num_experts > 0

    def at(self, layer: int | None = None, expert: int | None = None) -> "Row":
        """The row of one layer and expert. A stacked tensor keeps its name; `regions` knows the index."""
        places = {key: value for key, value in (("layer", layer), ("expert", expert)) if value is not None}

        def fill(name: str) -> str:
            for key, value in places.items():
                name = name.replace("{" + key + "}", str(value))
            return name

        stacked = expert if expert is not None and not any("{expert}" in name for name in self.hf) else None
        return replace(self, hf=tuple(map(fill, self.hf)), megatron=fill(self.megatron), expert=stacked)

    def expand(self, num_layers: int) -> Iterator["Row"]:
        """One row for each Megatron parameter."""
        layers = (None,) if not self.per_layer else range(num_layers) if self.layers is None else self.layers
        experts = range(self.num_experts) if self.is_expert else (None,)
        for layer in layers:
            yield from (self.at(layer, expert) for expert in experts)

    def stored_shapes(self) -> dict[str, Shape]:
        """The whole tensors of an expanded row by name, in the row's order."""
        rows: dict[str, Shape] = {}
        for name, shape in zip(self.hf, self.shapes, strict=True):
            before = rows[name][0] if name in rows else 0
            rows[name] = (before + shape[0], *shape[1:]) if shape else shape
        if self.expert is None:
            return rows
        return {name: (self.num_experts, *shape) for name, shape in rows.items()}

    def regions(self, shard: int = 0, num_shards: int = 1, *, num_rows: int | None = None) -> list[Region]:
        """What shard `shard` of `num_shards` holds of each part, in the fusion's order.

        Args:
            shard: tensor-parallel rank (of experts: expert-tensor-parallel).
            num_shards: size of that group; the row must be an expanded one.
            num_rows: of the parameter on this rank; needed where it is padded.

        Raises:
            InputError: a part's dim does not divide by `num_shards`.
        """
        stored = self.stored_shapes()
        regions = []
        for number, (name, shape) in enumerate(zip(self.hf, self.shapes, strict=True)):
            start, size = [0] * len(shape), list(shape)
            if self.padded:
                rows = shape[0] if num_rows is None else num_rows
                start[0] = min(shard * rows, shape[0])
                size[0] = min(rows, shape[0] - start[0])
            elif self.shard_dim is not None:
                start[self.shard_dim], size[self.shard_dim] = _share(name, shape[self.shard_dim], shard, num_shards)
            if self.starts is not None:
                start[0] += self.starts[number]
            if self.expert is not None:
                start, size = [self.expert, *start], [1, *size]
            regions.append(Region(name, stored[name], tuple(start), tuple(size), self.expert is not None))
        return regions


def _share(name: str, extent: int, shard: int, num_shards: int) -> tuple[int, int]:
    if extent % num_shards:
        raise InputError(
            "train.megatron: tensor parallel size",
            num_shards,
            f"must divide the {extent} channels of {name}",
            "Choose a size that does.",
        )
    return shard * (extent // num_shards), extent // num_shards


@dataclass(frozen=True, slots=True)
class WeightTable:
    """All rows of one model.

    Attributes:
        rows: patterns, per layer and expert or not.
        num_layers: how many layers the per-layer rows stand for.
        tied: Hugging Face names that repeat another tensor (an output head tied to the embedding), name to original.
            Such a tensor may be stored or not; where it is, it must equal the original and is exported again.
        outside: patterns (fnmatch) of tensors that the trainer does not hold (a vision tower); export passes them
            through unchanged.
    """

    rows: tuple[Row, ...]
    num_layers: int
    tied: Mapping[str, str] = field(default_factory=dict)
    outside: tuple[str, ...] = ()

    def expand(self) -> Iterator[Row]:
        """One row for each Megatron parameter, layers in order."""
        for row in self.rows:
            if not row.per_layer:
                yield from row.expand(self.num_layers)
        for layer in range(self.num_layers):
            for row in self.rows:
                if row.per_layer and (row.layers is None or layer in row.layers):
                    yield from replace(row, layers=(layer,)).expand(self.num_layers)

    def shapes(self) -> dict[str, Shape]:
        """Every Hugging Face tensor the model needs, with its shape."""
        return {name: shape for row in self.expand() for name, shape in row.stored_shapes().items()}

    def is_outside(self, name: str) -> bool:
        """Whether the trainer does not hold the tensor, and export passes it through."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.outside)

    def check_directory(self, directory: ModelDirectory) -> None:
        """Hold a directory's tensors against the table.

        Raises:
            InputError: tensors are missing, left over (both remainders are listed, with the nearest names), or of
                another shape.
        """
        shapes = self.shapes()
        stored = {name for name in directory.tensors if name not in self.tied and not self.is_outside(name)}
        check_names(
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
        check_names(
            "parameters of the Megatron model",
            "the weight table",
            set(parameters),
            {row.megatron: () for row in self.expand()},
        )


def check_names(what: str, table: str, found: set[str], expected: Mapping[str, object]) -> None:
    """Raise InputError with both remainders, unless what was found is what was expected."""
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
