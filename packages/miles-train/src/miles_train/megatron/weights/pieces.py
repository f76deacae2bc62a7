"""This rank's parts of Hugging Face tensors, and whole tensors gathered from all ranks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from miles_train.megatron.weights.share import Share
from miles_train.megatron.weights.table import Region
from miles_train.megatron.weights.whereabouts import Part, Placed


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A box of a Hugging Face tensor that this rank holds.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        offsets: first index of the box along each dim.
        tensor: the box, in the parameter's dtype and on its device; often a view of the live parameter. Its shape is
            the box's extent, also where the whole tensor stacks experts.
        is_first: whether no lower rank holds the same box: the first holders' pieces together are the model once.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor
    is_first: bool


class LocalParts:
    """Takes parts out of this rank's parameters."""

    def __init__(self, share: Share, tensors: Mapping[str, Tensor]):
        """Nothing is copied.

        Args:
            share: the rank's.
            tensors: the rank's, by global name.
        """
        self._share, self._tensors = share, tensors
        self._last: tuple[str, list[Tensor]] = "", []

    def box(self, part: Part) -> Tensor:
        """The part, shaped as its region; may be a view."""
        if self._last[0] != part.row:
            self._last = part.row, self._split(part.row)
        tensor = self._last[1][part.number]
        return tensor[None] if part.region.is_stacked else tensor

    def _split(self, name: str) -> list[Tensor]:
        row, tensor = self._share.rows[name], self._tensors[name].detach()
        if row.padded:
            regions = self._share.regions(row, tensor.shape[0])
            tensor = tensor[: sum(region.size[0] for region in regions)]
        return self._share.fusion(row).split(tensor)


def pieces(placed: Sequence[Placed], parts: LocalParts) -> Iterator[Piece]:
    """Yield what this rank holds, in the order of `placed`; no rank waits for another."""
    rank = distributed.get_rank()
    for whole in placed:
        for part in whole.parts:
            if rank in part.holders:
                is_first = rank == part.holders[0]
                yield Piece(whole.name, whole.shape, part.region.start, parts.box(part), is_first)


def gathered(placed: Sequence[Placed], parts: LocalParts, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole tensor on every rank; collective: all ranks take all tensors, in step.

    Every part is broadcast to every rank: what leaves the trainer should rather be sent as pieces.
    """
    rank = distributed.get_rank()
    for whole in placed:
        tensor = torch.empty(whole.shape, dtype=whole.dtype, device=device)
        for part in whole.parts:
            source = part.holders[0]
            box = parts.box(part) if rank == source else tensor.new_empty(part.region.size)
            box = box.contiguous()
            distributed.broadcast(box, src=source)
            cut_out(tensor, part.region).copy_(box)
        yield whole.name, tensor


def cut_out(whole: Tensor, region: Region) -> Tensor:
    """A view of the region of its whole tensor."""
    for dim, (start, size) in enumerate(zip(region.start, region.size, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole
