"""A receiver that holds its weights as an engine does.

Query, key and value in one parameter, gate and up in one, all experts of a layer stacked. A copy plan leads from the
checkpoint's tensors to these, and back: the fingerprint reads the fused parameters where the plan wrote them, so it
equals the digest of what was sent only if every byte arrived in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from miles_sync.buckets import Pieces
from miles_sync.digest import Digest, Run, Runs
from miles_sync.errors import MismatchError
from miles_sync.manifest import DTYPES, Manifest, TensorMeta
from miles_sync.messages import Mode
from miles_sync.plan import BoundPlan, Copy, CopyPlan, Live, Region, bind
from miles_sync.receivers import listed

_FUSED = (
    (re.compile(r"\.experts\.\d+\.(gate|up)_proj\."), ".experts.w13."),
    (re.compile(r"\.experts\.\d+\.down_proj\."), ".experts.w2."),
    (re.compile(r"\.(q|k|v)_proj\."), ".qkv_proj."),
    (re.compile(r"\.(gate|up)_proj\."), ".gate_up_proj."),
)


def fused_name(name: str) -> str:
    """The parameter in which a tensor of a checkpoint lies."""
    for pattern, into in _FUSED:
        fused, found = pattern.subn(into, name)
        if found:
            return fused
    return name


class FusedReceiver:
    """An engine's parameters for given tensors, all zero at first."""

    exact = True  # by its own fingerprint

    def __init__(self, metas: Sequence[TensorMeta], device: torch.device) -> None:
        """Allocate the parameters."""
        self.device = device
        self._tensors = {meta.name: meta for meta in metas}
        self._model = torch.nn.Module()
        self._where: dict[str, tuple[int, int]] = {}  # tensor: parameter, first element
        groups: dict[tuple[str, str], list[TensorMeta]] = {}
        for meta in metas:
            groups.setdefault((fused_name(meta.name), meta.dtype), []).append(meta)
        self._live: list[Live] = []
        self._parameters: list[torch.Tensor] = []
        for (name, dtype), parts in groups.items():
            at = 0
            for part in parts:
                self._where[part.name] = len(self._live), at
                at += -(-torch.Size(part.shape).numel() // 8) * 8  # the digest reads words of 8 bytes
            key = f"{name} {dtype}".replace(".", "_")
            value = torch.zeros(at, dtype=DTYPES[dtype], device=device)
            self._model.register_parameter(key, torch.nn.Parameter(value, requires_grad=False))
            self._live.append(Live(key, dtype, (at,)))
            self._parameters.append(value)
        self._bound: BoundPlan | None = None
        self._runs: Runs | None = None
        self._layout = ""

    def check(self, manifest: Manifest) -> None:
        """Make the plan. Raises `MismatchError` where tensors are missing, unknown or of another kind."""
        offered = {entry.name: TensorMeta(entry.name, entry.dtype, entry.shape) for entry in manifest.entries}
        if offered != self._tensors:
            names = sorted(name for name in offered | self._tensors if offered.get(name) != self._tensors.get(name))
            raise MismatchError(f"{len(names)} tensors differ from this model's: {listed(names)}", stage="begin")
        copies, runs = [], []
        for index, entry in enumerate(manifest.entries):
            parameter, at = self._where[entry.name]
            count = torch.Size(entry.shape).numel()
            if count:
                copies.append(Copy(index, parameter, Region(0, (count,), (1,)), Region(at, (count,), (1,))))
                runs.append(Run(entry.offset, self._parameters[parameter][at : at + count].view(torch.uint8)))
        self._layout = manifest.layout_id()
        plan = CopyPlan(self._layout, tuple(self._live), tuple(copies), (), {}, {}, {}, False)
        self._bound = bind(plan, manifest, self._model)
        self._runs = Runs(runs)

    def begin(self, manifest: Manifest, mode: Mode) -> None:
        """Nothing to do."""

    def install(self, pieces: Pieces) -> None:
        """Through the plan."""
        assert self._bound is not None
        self._bound.install(pieces)

    def commit(self, version: int) -> None:
        """Nothing to do."""

    def abandon(self) -> None:
        """Nothing to do."""

    def fingerprint(self) -> Callable[[], str]:
        """Of the fused parameters, as the tensors that were sent."""
        assert self._runs is not None
        digest = Digest()
        digest.update(self._runs)
        layout = self._layout
        return lambda: digest.hexdigest(layout)
