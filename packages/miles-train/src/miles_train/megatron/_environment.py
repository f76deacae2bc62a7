"""What must be settled before the first Megatron import; imported for its effect, first thing in `upstream`.

`megatron.core.jit` makes `torch.compile` its default fuser, and decorators apply it while modules are imported. Without
a GPU that would want a C++ compiler at the first forward pass. `TORCHDYNAMO_DISABLE` turns the decorators of the
modules that `megatron.core` itself imports into nothing, `disable_jit_fuser` those of all later ones.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what Megatron warns of on a machine it was not made for.

    "Transformer Engine and Apex are not installed", ten times at import: miles-train[megatron] means to be without.
    "Could not determine rank", "... is experimental": of no use to whoever starts a trainer.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _import_megatron() -> None:
    """Import what does work at import, and put back the root logger that `megatron.training` configures."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    import megatron.core.jit  # noqa: PLC0415  # after the environment is set

    if not torch.cuda.is_available():
        megatron.core.jit.disable_jit_fuser()
    import megatron.training.arguments  # noqa: PLC0415  # after the fuser is off
    import psutil  # noqa: F401, PLC0415  # Megatron's checkpoint writer needs it and does not ask for it

    root.setLevel(before[0])
    root.handlers[:] = before[1]


if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Megatron appends the git revision of whatever repository it lies in to its own version, by a subprocess at import.
os.environ.setdefault("NO_VCS_VERSION", "1")
try:
    with quietly():
        _import_megatron()
except ImportError as error:
    raise ImportError(
        f'Megatron cannot be imported: {error}. Install it with pip install "miles-train[megatron]".'
    ) from error
