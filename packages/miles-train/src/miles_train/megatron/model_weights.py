"""The weights of a trainer's model under their Hugging Face names: in, out, and on their way to engines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from miles_train.megatron import hf_export, runtime
from miles_train.megatron.upstream import parallel_state
from miles_train.megatron.weights.convert import hf_weights
from miles_train.megatron.weights.load import Progress, Source, load_weights, stored_ties
from miles_train.megatron.weights.names import global_tensors
from miles_train.megatron.weights.pieces import LocalParts, Piece, gathered, pieces
from miles_train.megatron.weights.share import Share
from miles_train.megatron.weights.table import WeightTable
from miles_train.megatron.weights.whereabouts import Placed, find


class ModelWeights:
    """This rank's part of a model, and with the other ranks' the whole of it."""

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        table: WeightTable,
        source: Source,
    ):
        """Hold them together; nothing is read.

        Args:
            chunks: the rank's Megatron model, unwrapped.
            table: of its architecture, checked against the directory.
            source: the directory that the model comes from.
        """
        self._chunks, self._table, self._source = chunks, table, source
        self._ties = stored_ties(table, source.directory)
        self._share = Share.of_this_rank(table)
        self._placed: list[Placed] | None = None

    def load(self, progress: Progress | None = None) -> None:
        """Read the rank's part from the directory; see `load_weights`."""
        load_weights(self._chunks, self._table, self._source, progress)

    def whole(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield every whole tensor with its name, on every rank.

        Where each rank holds a whole model these are views of it, and no rank waits for another. Else it is collective:
        all ranks take all tensors, in step, and every tensor goes to every rank: `pieces` is the way to move a model.

        Args:
            device: of the model.
        """
        if _holds_all():
            yield from hf_weights(global_tensors(self._chunks), self._table, self._ties)
        else:
            yield from gathered(self._find(), self._parts(), device)

    def pieces(self) -> Iterator[Piece]:
        """Yield this rank's boxes of all tensors, tied ones included.

        The first call is collective: ranks tell each other once what they hold. Later ones are not.
        """
        return pieces(self._find(), self._parts())

    def gathered(self, tensors: Mapping[str, Tensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors of what lies beside the parameters (their gradients), tied ones once; collective.

        Args:
            tensors: of this rank, float32, by the global name of the parameter, which gives the shape.
            device: of the model.
        """
        wide = [replace(placed, dtype=torch.float32) for placed in self._find() if placed.name not in self._ties]
        yield from gathered(wide, LocalParts(self._share, tensors), device)

    def export(self, path: Path, *, max_shard_bytes: int = hf_export.MAX_SHARD_BYTES) -> None:
        """Write a Hugging Face directory; collective, see `hf_export.export`."""
        hf_export.export(
            path,
            self._source,
            self._table,
            self._find(),
            self._share,
            global_tensors(self._chunks),
            max_shard_bytes=max_shard_bytes,
            group=runtime.host_group(),
        )

    def _parts(self) -> LocalParts:
        return LocalParts(self._share, global_tensors(self._chunks))

    def _find(self) -> list[Placed]:
        if self._placed is None:
            self._placed = find(self._share, global_tensors(self._chunks), self._ties)
        return self._placed


def _holds_all() -> bool:
    return (
        parallel_state.get_tensor_model_parallel_world_size() == 1
        and parallel_state.get_pipeline_model_parallel_world_size() == 1
        and parallel_state.get_expert_model_parallel_world_size() == 1
        and parallel_state.get_expert_tensor_parallel_world_size() == 1
    )
