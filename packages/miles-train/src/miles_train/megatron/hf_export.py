"""Writes a Hugging Face directory from the trainer's ranks: streamed, read back, and only then given its name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, distributed

from miles_train import folders
from miles_train.errors import CheckpointError
from miles_train.export import MAX_SHARD_BYTES, is_model_directory, write_rest
from miles_train.megatron.background import run_on_all
from miles_train.megatron.weights.load import Source
from miles_train.megatron.weights.pieces import LocalParts
from miles_train.megatron.weights.share import Share
from miles_train.megatron.weights.table import Region, WeightTable
from miles_train.megatron.weights.whereabouts import Placed
from miles_train.megatron.weights.write import divide, write
from miles_train.model_dir import ModelDirectory

__all__ = ["MAX_SHARD_BYTES", "export"]


def export(
    path: Path,
    source: Source,
    table: WeightTable,
    placed: Sequence[Placed],
    share: Share,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Write config, tokenizer files and weights; collective.

    Weights are written in the parameters' dtype. Those that stay in float32 beside a narrower model are written in the
    dtype that the source stores them in, as long as that loses nothing. Tensors outside the table's model are copied
    from the source, FP8 ones decoded, and so is a source's config without its quantisation.

    Args:
        path: directory to make, the same on all ranks. A complete model directory that is there is replaced; anything
            else is not.
        source: the directory that the model was loaded from.
        table: of the architecture.
        placed: from `whereabouts.find`.
        share: this rank's.
        tensors: this rank's, by global name.
        max_shard_bytes: a file is closed before it grows beyond this.
        group: of all ranks, that moves tensors of the CPU; None for the default group.

    Raises:
        CheckpointError: it could not be written, or did not read back bit for bit; nothing new is at `path` then. Every
            rank raises.
    """
    outside = _outside(source, table, placed)
    narrowed = _dtypes(source.directory, table, placed, share, tensors)
    work = divide([*placed, *outside], narrowed, distributed.get_world_size(), max_shard_bytes)
    partial = folders.partial_name(path)
    parts = LocalParts(share, tensors)
    is_first = distributed.get_rank() == 0

    def begin() -> None:
        if is_first:
            folders.begin(path, replaces=is_model_directory)

    def finish() -> None:
        if is_first:
            trained = {narrowed.get(tensor.name, tensor.dtype) for tensor in placed}
            write_rest(partial, source.directory, work.file_of, work.nbytes, trained)
            folders.publish(path)

    try:
        run_on_all(begin)
        run_on_all(lambda: write(partial, work, parts, _FromFile(source), group), (OSError, CheckpointError))
        run_on_all(finish)
    except OSError as error:
        if is_first:
            folders.discard(path)
        raise CheckpointError(
            f"export {path} could not be written: {error}. The directory must be new or hold an older export, and its "
            "disk be writable and have room."
        ) from None


class _FromFile(Mapping[str, Tensor]):
    """Whole tensors of the source, read when they are asked for."""

    def __init__(self, source: Source):
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        shape = self._source.directory.tensors[name].shape
        with self._source.part(Region(name, shape, (0,) * len(shape), shape)) as tensor:
            return tensor.clone()

    def __iter__(self):
        return iter(self._source.directory.tensors)

    def __len__(self) -> int:
        return len(self._source.directory.tensors)


def _outside(source: Source, table: WeightTable, placed: Sequence[Placed]) -> list[Placed]:
    """What the trainer does not hold, in the dtypes that it is written in."""
    directory = source.directory
    names = [name for name in directory.tensors if table.is_outside(name)]
    scaled = {} if directory.scales is None else directory.scales.tensors
    return [
        Placed(
            name,
            directory.tensors[name].shape,
            placed[0].dtype if name in scaled else directory.tensors[name].torch_dtype,
            (),
        )
        for name in names
    ]


def _dtypes(
    directory: ModelDirectory,
    table: WeightTable,
    placed: Sequence[Placed],
    share: Share,
    tensors: Mapping[str, Tensor],
) -> dict[str, torch.dtype]:
    """The narrower dtype of tensors kept in float32 that lose nothing by it; collective."""
    candidates = {
        tensor.name: directory.tensors[tensor.name].torch_dtype
        for tensor in placed
        if tensor.name in directory.tensors and all(share.rows[part.row].fp32 for part in tensor.parts)
    }
    candidates = {name: dtype for name, dtype in candidates.items() if dtype in (torch.bfloat16, torch.float16)}
    if all(tensor.dtype == torch.float32 for tensor in placed) or not candidates:
        return {}
    parts, rank = LocalParts(share, tensors), distributed.get_rank()
    loses = set()
    for tensor in placed:
        dtype = candidates.get(tensor.name)
        for part in tensor.parts:
            if dtype is not None and part.holders[0] == rank:
                box = parts.box(part)
                if not torch.equal(box.to(dtype).to(box.dtype), box):
                    loses.add(tensor.name)
    everyone = [loses] * distributed.get_world_size()
    distributed.all_gather_object(everyone, loses)
    lost = set().union(*everyone)
    return {name: dtype for name, dtype in candidates.items() if name not in lost}
