"""Fill this rank's part of a Megatron model from a Hugging Face directory, reading only what the rank holds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from miles_core.errors import InputError
from miles_train.megatron.weights.names import local_tensors
from miles_train.megatron.weights.share import Share
from miles_train.megatron.weights.table import Region, WeightTable
from miles_train.model_dir import SCALE, ModelDirectory
from miles_train.tensor_files import MappedFiles

# FP8 weight [N, K], cut at the edges of blocks or of the tensor, and the float32 factors of its blocks, one for each,
# to numbers [N, K].
Decode = Callable[[Tensor, Tensor], Tensor]
# Bytes of this rank's tensors that are filled, and of all of them.
Progress = Callable[[int, int], None]
_ROWS_AT_A_TIME = 4096


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module],
    table: WeightTable,
    source: "Source",
    progress: Progress | None = None,
) -> None:
    """Copy from the directory what this rank's tensors hold, in the tensors' dtypes.

    Collective. Files are mapped and their pages given back after each tensor: beside the model, the largest parameter
    and what it is made of take memory. Padding of the vocabulary becomes zero.

    Args:
        chunks: of the rank's Megatron model, unwrapped, on any device.
        table: of the same architecture, checked against the directory.
        source: where the weights lie.
        progress: told after each tensor.

    Raises:
        InputError: a tensor of the model has no row or a row no tensor, a size does not divide, or a tied tensor
            is stored and differs.
    """
    _check_ties(table, source.directory)
    share = Share.of_this_rank(table)
    held = list(local_tensors(chunks))
    share.check(name for name, _ in held)
    total = sum(tensor.nbytes for _, tensor in held)
    done = 0
    for name, tensor in held:
        row = share.rows[name]
        num_rows = tensor.shape[0] if row.padded else None
        with ExitStack() as stack:
            parts = [stack.enter_context(source.part(region)) for region in share.regions(row, num_rows)]
            joined = share.fusion(row).join(parts)
            if row.padded:
                tensor[len(joined) :] = 0
                tensor[: len(joined)].copy_(joined)
            else:
                _check_shape(name, tensor, joined)
                tensor.copy_(joined)
            del parts, joined
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)


class Source:
    """Parts of parameters out of a directory."""

    def __init__(self, directory: ModelDirectory, decode: Decode | None = None):
        """Nothing is opened yet.

        Args:
            directory: to read.
            decode: makes numbers of FP8 weights.

        Raises:
            InputError: the directory holds such and there is no decoder.
        """
        if directory.scales is not None and decode is None:
            raise InputError(
                f"quantization_config in {directory.path / 'config.json'}",
                "fp8",
                "its weights need a decoder, and none was handed in",
                "Pass `decode`, for example that of miles-precision, or take the unquantised model.",
            )
        self.directory = directory
        self._files: MappedFiles = directory.reader()
        self._scales, self._decode = directory.scales, decode

    @contextmanager
    def part(self, region: Region) -> Iterator[Tensor]:
        """What lies in the region, to be used within the context."""
        if self._scales is not None and region.name in self._scales.tensors and 0 not in region.size:
            yield self._decoded(region)
            return
        with self._files.region(region.name, region.start, region.size) as box:
            yield box[0] if region.is_stacked else box

    def _decoded(self, region: Region) -> Tensor:
        """Decode the blocks that the region touches, and cut it out of them."""
        assert self._scales is not None and self._decode is not None
        lead = len(region.shape) - 2
        start, size, inner, blocks, count = [], [], [], [], []
        for dim in range(len(region.shape)):
            step = 1 if dim < lead else self._scales.block[dim - lead]
            first = region.start[dim] // step
            last = -(-(region.start[dim] + region.size[dim]) // step)
            begin, end = first * step, min(last * step, region.shape[dim])
            blocks.append(first)
            count.append(last - first)
            start.append(begin)
            size.append(end - begin)
            inner.append(slice(region.start[dim] - begin, region.start[dim] - begin + region.size[dim]))
        with (
            self._files.region(region.name, start, size) as weight,
            self._files.region(region.name + SCALE, blocks, count) as scale,
        ):
            matrices = weight.reshape(-1, *weight.shape[lead:])
            factors = scale.reshape(-1, *scale.shape[lead:]).float()
            decoded = [self._decode(*pair) for pair in zip(matrices, factors, strict=True)]
            numbers = decoded[0] if len(decoded) == 1 else torch.stack(decoded)
        box = numbers.reshape(size)[tuple(inner)]
        return box[0] if region.is_stacked else box


def _check_shape(name: str, tensor: Tensor, joined: Tensor) -> None:
    if tensor.shape != joined.shape:
        raise InputError(
            f"shape of {name} in the Megatron model",
            tuple(tensor.shape),
            f"the weight table makes this rank's part {tuple(joined.shape)}",
            "Spec and table of the architecture disagree: correct one of them.",
        )


def stored_ties(table: WeightTable, directory: ModelDirectory) -> dict[str, str]:
    """The tied names that the directory stores all the same, name to original."""
    return {name: original for name, original in table.tied.items() if name in directory.tensors}


def _check_ties(table: WeightTable, directory: ModelDirectory) -> None:
    files = directory.reader()
    for name, original in stored_ties(table, directory).items():
        if not _equal(files, name, original, directory.tensors[name].shape):
            raise InputError(
                f"{name} in {directory.path}",
                f"differs from {original}",
                "tie_word_embeddings = true makes them one tensor",
                'Set "tie_word_embeddings": false in config.json to train both.',
            )


def _equal(files: MappedFiles, name: str, other: str, shape: Sequence[int]) -> bool:
    """Whether two matrices are the same, held beside each other some rows at a time."""
    for first in range(0, shape[0], _ROWS_AT_A_TIME):
        start, size = (first, 0), (min(_ROWS_AT_A_TIME, shape[0] - first), *shape[1:])
        with files.region(name, start, size) as one, files.region(other, start, size) as two:
            if one.dtype != two.dtype or not torch.equal(one, two):
                return False
    return True


@torch.no_grad()
def keep_float32(chunks: Sequence[nn.Module], table: WeightTable) -> None:
    """Put back in float32 what a table marks so, after a wrapper has cast the whole model; before weights are loaded.

    Args:
        chunks: of the rank's Megatron model, unwrapped.
        table: of the same architecture.
    """
    marked = {row.megatron for row in table.expand() if row.fp32}
    for name, tensor in local_tensors(chunks):
        if name in marked:
            tensor.data = tensor.data.float()
