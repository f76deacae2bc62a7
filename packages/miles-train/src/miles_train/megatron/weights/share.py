"""What of a model one rank holds: its rows by global name, and its cut of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import distributed

from miles_train.megatron.upstream import parallel_state
from miles_train.megatron.weights.table import Fusion, Region, Row, WeightTable, check_names


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's cut of every row of a table; which rows it holds at all, its model says.

    Attributes:
        rows: expanded, by the global name of the parameter.
        tensor: index and number of tensor-parallel shards.
        expert_tensor: of expert rows.
    """

    rows: Mapping[str, Row]
    tensor: tuple[int, int]
    expert_tensor: tuple[int, int]

    @classmethod
    def of_this_rank(cls, table: WeightTable) -> "Share":
        """By Megatron's groups, which must stand."""
        return cls(
            {row.megatron: row for row in table.expand()},
            (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
            # Not None once groups stand, as upstream annotates.
            (
                parallel_state.get_expert_tensor_parallel_rank() or 0,
                parallel_state.get_expert_tensor_parallel_world_size() or 1,
            ),
        )

    def cut(self, row: Row) -> tuple[int, int]:
        """Index and number of the shards of a row; (0, 1) where each rank holds all of it."""
        if row.shard_dim is None and not row.padded:
            return 0, 1
        return self.expert_tensor if row.is_expert else self.tensor

    def regions(self, row: Row, num_rows: int | None = None) -> list[Region]:
        """Where the rank's parts of a row lie in the checkpoint.

        Args:
            row: expanded.
            num_rows: of the rank's parameter, where the row is padded.
        """
        return row.regions(*self.cut(row), num_rows=num_rows)

    def fusion(self, row: Row) -> Fusion:
        """How the rank's parts lie in its parameter."""
        num_shards = self.cut(row)[1]
        return row.fusion if num_shards == 1 else row.fusion.sharded(num_shards)

    def check(self, names: Iterable[str]) -> None:
        """Hold what the ranks hold together against the table; collective.

        Args:
            names: of this rank's tensors.

        Raises:
            InputError: a tensor has no row, or no rank holds a row; raised on every rank.
        """
        mine = set(names)
        index = {name: number for number, name in enumerate(self.rows)}
        known = np.array(sorted(index[name] for name in mine if name in index), np.int32)
        everyone: list[tuple[np.ndarray, list[str]]] = [(known, [])] * distributed.get_world_size()
        distributed.all_gather_object(everyone, (known, sorted(mine - index.keys())))
        found = set(np.concatenate([numbers for numbers, _ in everyone]).tolist())
        names_held = {name for name, number in index.items() if number in found}
        unknown = {name for _, others in everyone for name in others}
        check_names("tensors of the Megatron model", "the weight table", names_held | unknown, self.rows)
