"""Models of known shapes for benchmarks: the tensors that a trainer sends, and a receiver that holds them fused.

The receiver keeps what an engine keeps: query, key and value in one parameter, gate and up in one, all experts of a
layer stacked. A copy plan leads from one to the other, and back: its fingerprint reads the fused parameters where the
plan wrote them, so it equals the digest of what was sent only if every byte arrived in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from miles_sync.buckets import Pieces
from miles_sync.digest import Digest, Run, Runs
from miles_sync.manifest import Manifest
from miles_sync.messages import Mode
from miles_sync.plan import BoundPlan, Copy, CopyPlan, Live, Region, bind


@dataclass(frozen=True)
class Shapes:
    """A decoder of the Qwen3 family; `experts` 0 is dense, `inter` is of one expert otherwise."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    experts: int = 0
    head_dim: int = 128

    def fused(self) -> Iterator[tuple[str, tuple[int, ...], list[tuple[str, tuple[int, ...]]]]]:
        """Parameters of the engine: name, shape, and the trainer's tensors that lie in it one after the other."""
        yield from (_same(name, (self.vocab, self.hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        yield _same("model.norm.weight", (self.hidden,))
        for layer in range(self.layers):
            yield from self._attention(f"model.layers.{layer}")
            yield from self._mlp(f"model.layers.{layer}.mlp")

    def _attention(self, at: str) -> Iterator[tuple[str, tuple[int, ...], list[tuple[str, tuple[int, ...]]]]]:
        rows = {"q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim, "v": self.kv_heads * self.head_dim}
        parts = [(f"{at}.self_attn.{name}_proj.weight", (count, self.hidden)) for name, count in rows.items()]
        yield f"{at}.self_attn.qkv_proj.weight", (sum(rows.values()), self.hidden), parts
        yield _same(f"{at}.self_attn.o_proj.weight", (self.hidden, rows["q"]))
        for name, size in (
            ("self_attn.q_norm", self.head_dim),
            ("self_attn.k_norm", self.head_dim),
            ("input_layernorm", self.hidden),
            ("post_attention_layernorm", self.hidden),
        ):
            yield _same(f"{at}.{name}.weight", (size,))

    def _mlp(self, at: str) -> Iterator[tuple[str, tuple[int, ...], list[tuple[str, tuple[int, ...]]]]]:
        up, down = (self.inter, self.hidden), (self.hidden, self.inter)
        if not self.experts:
            parts = [(f"{at}.{name}_proj.weight", up) for name in ("gate", "up")]
            yield f"{at}.gate_up_proj.weight", (2 * self.inter, self.hidden), parts
            yield _same(f"{at}.down_proj.weight", down)
            return
        yield _same(f"{at}.gate.weight", (self.experts, self.hidden))
        experts = [f"{at}.experts.{index}" for index in range(self.experts)]
        parts = [(f"{expert}.{name}_proj.weight", up) for expert in experts for name in ("gate", "up")]
        yield f"{at}.experts.w13_weight", (self.experts, 2 * self.inter, self.hidden), parts
        parts = [(f"{expert}.down_proj.weight", down) for expert in experts]
        yield f"{at}.experts.w2_weight", (self.experts, *down), parts

    def nbytes(self) -> int:
        """In bfloat16."""
        return 2 * sum(torch.Size(shape).numel() for _, shape, _ in self.fused())


SHAPES = {
    "8b": Shapes(layers=36, hidden=4096, heads=32, kv_heads=8, inter=12288, vocab=151936),
    "30b": Shapes(layers=48, hidden=2048, heads=32, kv_heads=4, inter=768, vocab=151936, experts=128),
    "tiny": Shapes(layers=2, hidden=256, heads=4, kv_heads=2, inter=512, vocab=9000),
    "tiny-moe": Shapes(layers=2, hidden=256, heads=4, kv_heads=2, inter=64, vocab=9000, experts=8),
}
"""Qwen3-8B (399 tensors, 16.4 GB), Qwen3-30B-A3B (18,867 tensors, 61.1 GB), and small ones for tests."""


def trainer_tensors(shapes: Shapes, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """The tensors that are sent: bfloat16 with random bits, each an allocation of its own."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for _, _, parts in shapes.fused():
        for name, shape in parts:
            bits = torch.empty(shape, dtype=torch.int16, device=device)
            tensors[name] = bits.random_(-(1 << 15), 1 << 15, generator=generator).view(torch.bfloat16)
    return tensors


def change(tensors: dict[str, torch.Tensor], version: int) -> None:
    """Change every element, as a training step would."""
    for tensor in tensors.values():
        tensor.view(torch.int16).bitwise_xor_(2 * version + 1)


class FusedReceiver:
    """An engine's parameters, written through a copy plan."""

    exact = True  # by its own fingerprint

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        """Allocate the parameters, all zero."""
        self.device = device
        self._model = torch.nn.Module()
        self._where: dict[str, tuple[int, int]] = {}  # trainer's tensor: parameter, first element
        self._live: list[Live] = []
        for name, shape, parts in shapes.fused():
            value = torch.zeros(shape, dtype=torch.bfloat16, device=device)
            flat_name = name.replace(".", "_")
            self._model.register_parameter(flat_name, torch.nn.Parameter(value, requires_grad=False))
            at = 0
            for part, part_shape in parts:
                self._where[part] = len(self._live), at
                at += torch.Size(part_shape).numel()
            self._live.append(Live(flat_name, "bfloat16", shape))
        self._bound: BoundPlan | None = None
        self._runs: Runs | None = None
        self._layout = ""

    def check(self, manifest: Manifest) -> None:
        """Make the plan."""
        copies = []
        for index, entry in enumerate(manifest.entries):
            parameter, at = self._where[entry.name]
            count = torch.Size(entry.shape).numel()
            copies.append(Copy(index, parameter, Region(0, (count,), (1,)), Region(at, (count,), (1,))))
        self._layout = manifest.layout_id()
        plan = CopyPlan(self._layout, tuple(self._live), tuple(copies), (), {}, {}, {}, False)
        self._bound = bind(plan, manifest, self._model)
        parameters = dict(self._model.named_parameters())
        self._runs = Runs(
            Run(entry.offset, parameters[self._live[where].name].view(-1)[at:][: entry.nbytes // 2].view(torch.uint8))
            for entry in manifest.entries
            for where, at in [self._where[entry.name]]
        )

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


def _same(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    return name, shape, [(name, shape)]
