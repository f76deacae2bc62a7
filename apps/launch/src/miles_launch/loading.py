"""What an app hands to a trainer for loading a model: a decoder of FP8 weights, and a bar in its log or terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from torch import Tensor


def decode_fp8(weight: "Tensor", scale: "Tensor") -> "Tensor":
    """Numbers of an FP8 weight [N, K] with one float32 factor for each block of 128 x 128, in float32."""
    from miles_precision import FP8Block  # noqa: PLC0415 (imports torch: the trainer's process alone)

    return FP8Block().decode({"weight": weight, "weight_scale_inv": scale})


@contextmanager
def loading_bar(rank: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, of rank 0 alone: drawn in a terminal, one line at the end in a log.

    Yields:
        What a trainer takes as `progress`.
    """
    columns = (
        TextColumn("loading weights"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=rank != 0) as bar:
        task = bar.add_task("load", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
