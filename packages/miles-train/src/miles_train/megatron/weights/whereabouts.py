"""Which ranks hold which part of every Hugging Face tensor: worked out once, the same on every rank."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from miles_train.megatron.weights.share import Share
from miles_train.megatron.weights.table import Region
from miles_train.tensor_files import DTYPES

_DTYPES = tuple(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor that one row holds.

    Attributes:
        row: global name of the parameter.
        number: of the part in the row's fusion.
        region: the box.
        holders: ranks that hold it, ascending.
    """

    row: str
    number: int
    region: Region
    holders: tuple[int, ...]

    def source_for(self, rank: int) -> int:
        """The holder that gives the part to a rank: itself, or the nearest."""
        return min(self.holders, key=lambda holder: (abs(holder - rank), holder))


@dataclass(frozen=True, slots=True)
class Placed:
    """A Hugging Face tensor and where its parts are.

    Attributes:
        name: of the tensor.
        shape: of the whole.
        dtype: of the parameters.
        parts: boxes that make up the whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


class _Holding(NamedTuple):
    """What one rank tells the others."""

    tensor: tuple[int, int]
    expert_tensor: tuple[int, int]
    rows: np.ndarray
    dtypes: np.ndarray
    num_rows: dict[int, int]


def find(share: Share, tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> list[Placed]:
    """Every Hugging Face tensor in the table's order, each followed by those tied to it; collective.

    Args:
        share: this rank's.
        tensors: of this rank, by global name.
        ties: repeated tensors to give as well, name to original.
    """
    index = {name: number for number, name in enumerate(share.rows)}
    order = sorted(tensors, key=index.__getitem__)
    mine = _Holding(
        share.tensor,
        share.expert_tensor,
        np.array([index[name] for name in order], np.int32),
        np.array([_DTYPES.index(tensors[name].dtype) for name in order], np.int8),
        {index[name]: tensors[name].shape[0] for name in order if share.rows[name].padded},
    )
    everyone = [mine] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    repeated: dict[str, list[str]] = {}
    for name, original in ties.items():
        repeated.setdefault(original, []).append(name)
    placed = []
    for tensor in _placed(share, everyone):
        placed.append(tensor)
        placed += [replace(tensor, name=name) for name in repeated.get(tensor.name, ())]
    return placed


def _placed(share: Share, everyone: list[_Holding]) -> Iterator[Placed]:
    holders: dict[int, dict[int, list[int]]] = {}  # row, shard, ranks
    dtypes: dict[int, torch.dtype] = {}
    num_rows: dict[int, int] = {}
    rows = list(share.rows.values())
    for rank, holding in enumerate(everyone):
        theirs = Share(share.rows, holding.tensor, holding.expert_tensor)
        num_rows.update(holding.num_rows)
        for number, dtype in zip(holding.rows.tolist(), holding.dtypes.tolist(), strict=True):
            shard, _ = theirs.cut(rows[number])
            holders.setdefault(number, {}).setdefault(shard, []).append(rank)
            dtypes[number] = _DTYPES[dtype]
    unfinished: dict[str, tuple[int, list[Part]]] = {}
    for number, row in enumerate(rows):
        _, num_shards = share.cut(row)
        for shard, ranks in sorted(holders[number].items()):
            regions = row.regions(shard, num_shards, num_rows=num_rows.get(number))
            for part, region in enumerate(regions):
                covered, parts = unfinished.setdefault(region.name, (0, []))
                if 0 not in region.size:
                    parts.append(Part(row.megatron, part, region, tuple(ranks)))
                    covered += int(np.prod(region.size))
                unfinished[region.name] = covered, parts
                if covered == int(np.prod(region.shape)):
                    del unfinished[region.name]
                    yield Placed(region.name, region.shape, dtypes[number], tuple(parts))
    assert not unfinished, list(unfinished)[:4]
