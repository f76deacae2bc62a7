"""Writes all weights into safetensors files: every rank the files it owns, tensor by tensor, at the same time.

A tensor goes to a rank that holds part of it, to the one with the least to write. What other ranks hold of it they send
when its turn comes; no rank ever has more than one whole tensor beside its model.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed

from miles_train.errors import CheckpointError
from miles_train.megatron.weights.pieces import LocalParts, cut_out
from miles_train.megatron.weights.whereabouts import Part, Placed
from miles_train.shard_files import Entry, ShardFile, cut_into_files

# A rank more is put to work for each so many bytes: small models stay one file.
_BYTES_PER_WRITER = 256 * 2**20
# Parts on their way to their writers, in bytes; a rank waits before it goes beyond.
_MAX_SENT_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Work:
    """Who writes what.

    Attributes:
        files: of each writing rank, in its order: name and entries.
        turns: every tensor with its writer, in the order in which all ranks take part.
    """

    files: Mapping[int, Sequence[tuple[str, Sequence[Entry]]]]
    turns: Sequence[tuple[int, Placed]]

    @property
    def file_of(self) -> dict[str, str]:
        """The file of each tensor."""
        return {entry.name: file for files in self.files.values() for file, entries in files for entry in entries}

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(entry.nbytes for files in self.files.values() for _, entries in files for entry in entries)


def divide(
    placed: Sequence[Placed],
    dtypes: Mapping[str, torch.dtype],
    world_size: int,
    max_shard_bytes: int,
) -> Work:
    """Divide the tensors among the ranks by bytes; the same on every rank.

    Args:
        placed: all tensors. One without parts comes from a file, and any rank may write it.
        dtypes: that tensors are written in, where it is not that of their parameters.
        world_size: number of ranks.
        max_shard_bytes: a file is closed before it grows beyond this, and no rank writes for less than this or
            256 MiB.
    """
    entries = [Entry(tensor.name, dtypes.get(tensor.name, tensor.dtype), tensor.shape) for tensor in placed]
    total = sum(entry.nbytes for entry in entries)
    num_writers = min(world_size, max(1, total // min(_BYTES_PER_WRITER, max_shard_bytes)))
    writers = [index * world_size // num_writers for index in range(num_writers)]
    load = dict.fromkeys(writers, 0)
    writer_of: dict[str, int] = {}
    for entry, tensor in sorted(zip(entries, placed, strict=True), key=lambda pair: -pair[0].nbytes):
        near = {rank for part in tensor.parts for rank in part.holders} & load.keys()
        writer = min(near or writers, key=lambda rank: (load[rank], rank))
        load[writer] += entry.nbytes
        writer_of[tensor.name] = writer
    by_writer: dict[int, list[Entry]] = {writer: [] for writer in writers}
    for entry in entries:
        by_writer[writer_of[entry.name]].append(entry)
    return _named(
        {writer: cut_into_files(mine, max_shard_bytes) for writer, mine in by_writer.items() if mine},
        {tensor.name: tensor for tensor in placed},
    )


def _named(cut: Mapping[int, list[list[Entry]]], placed: Mapping[str, Placed]) -> Work:
    count = sum(map(len, cut.values()))
    names = iter(
        ["model.safetensors"]
        if count == 1
        else [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    )
    files = {writer: [(next(names), entries) for entries in mine] for writer, mine in cut.items()}
    queues = {writer: deque(entry for _, entries in mine for entry in entries) for writer, mine in files.items()}
    turns = []
    while any(queues.values()):
        turns += [(writer, placed[queue.popleft().name]) for writer, queue in queues.items() if queue]
    return Work(files, turns)


def write(
    folder: Path,
    work: Work,
    parts: LocalParts,
    from_file: Mapping[str, Tensor],
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Write this rank's files, and send other writers what they need; collective.

    Args:
        folder: that exists, the same on all ranks.
        work: from `divide`.
        parts: this rank's.
        from_file: tensors without parts, by name.
        group: of all ranks, that moves tensors of the CPU; None for the default group.

    Raises:
        OSError: this rank could not write. It took part to the end, so that others did not wait for it.
        CheckpointError: a file did not read back as it was written.
    """
    rank = distributed.get_rank()
    sender = _Sender(parts, group)
    with ExitStack() as stack:
        output = _Output(folder, work.files.get(rank, ()), stack)
        for writer, tensor in work.turns:
            if writer != rank:
                sender.send(tensor, writer)
            elif tensor.parts:
                output.write(sender.receive(tensor))
            else:
                output.write(from_file[tensor.name])
        sender.wait()
        output.finish()


class _Output:
    """This rank's files one after the other; keeps the first error and swallows tensors from there on."""

    def __init__(self, folder: Path, files: Sequence[tuple[str, Sequence[Entry]]], stack: ExitStack):
        self._waiting = iter([(folder / name, entries) for name, entries in files])
        self._stack, self._error = stack, None
        self._file: ShardFile | None = None
        self._dtypes: Iterator[torch.dtype] = iter([entry.dtype for _, entries in files for entry in entries])

    def write(self, tensor: Tensor) -> None:
        tensor = tensor.to(next(self._dtypes))
        if self._error is not None:
            return
        try:
            if self._file is None:
                self._file = self._stack.enter_context(ShardFile(*next(self._waiting)))
            self._file.write(tensor)
            if self._file.is_full:
                self._file.finish()
                self._file = None
        except (OSError, CheckpointError) as error:
            self._error = error

    def finish(self) -> None:
        if self._error is not None:
            raise self._error


class _Sender:
    """Moves parts between ranks. All ranks go through the same turns: no two ever wait for each other."""

    def __init__(self, parts: LocalParts, group: distributed.ProcessGroup | None):
        self._parts, self._group = parts, group
        self._rank = distributed.get_rank()
        self._sent: deque[tuple[distributed.Work, Tensor]] = deque()
        self._sent_bytes = 0

    def send(self, tensor: Placed, writer: int) -> None:
        """Send what this rank is to give of a tensor."""
        for part in tensor.parts:
            if part.source_for(writer) != self._rank:
                continue
            box = self._parts.box(part).to("cpu").contiguous().clone()
            self._sent.append((_started(distributed.isend(_bytes(box), writer, group=self._group)), box))
            self._sent_bytes += box.nbytes
            while self._sent_bytes > _MAX_SENT_BYTES:
                self._wait_for_one()

    def receive(self, tensor: Placed) -> Tensor:
        """The whole tensor on the CPU; may be a view of a parameter."""
        only = tensor.parts[0]
        if len(tensor.parts) == 1 and self._rank in only.holders:
            return self._parts.box(only).to("cpu")
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for part in tensor.parts:
            cut_out(whole, part.region).copy_(self._part(part, whole.dtype))
        return whole

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        while self._sent:
            self._wait_for_one()

    def _part(self, part: Part, dtype: torch.dtype) -> Tensor:
        source = part.source_for(self._rank)
        if source == self._rank:
            return self._parts.box(part)
        box = torch.empty(part.region.size, dtype=dtype)
        distributed.recv(_bytes(box), source, group=self._group)
        return box

    def _wait_for_one(self) -> None:
        work, box = self._sent.popleft()
        work.wait()
        self._sent_bytes -= box.nbytes


def _bytes(tensor: Tensor) -> Tensor:
    """A view as bytes: every backend moves those."""
    return tensor.reshape(-1).view(torch.uint8)


def _started(work: distributed.Work | None) -> distributed.Work:
    assert work is not None  # None for ranks outside the group
    return work
