"""Sources: foreign metadata, and tensors that are encoded on their way."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from miles_sync.errors import ManifestError
from miles_sync.manifest import TensorMeta
from miles_sync.sources import Encoded, NamedTensors, as_source, metadata_of

Triple = namedtuple("Triple", "name dtype shape")


@dataclass
class Info:
    shape: torch.Size
    dtype: torch.dtype
    name: str


class Foreign:
    """A source of another stack: no type of ours."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def metadata(self) -> list[Any]:
        return self.items

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "w", torch.ones(2, 3)


@pytest.mark.parametrize(
    "item",
    [
        TensorMeta("w", "float32", (2, 3)),
        ("w", torch.float32, torch.Size([2, 3])),
        ["w", "float32", [2, 3]],
        Triple("w", "torch.float32", (2, 3)),
        Info(torch.Size([2, 3]), torch.float32, "w"),
    ],
)
def test_metadata_of_other_stacks_is_understood(item: Any) -> None:
    source = as_source(Foreign([item]))
    assert metadata_of(source) == [TensorMeta("w", "float32", (2, 3))]
    assert next(iter(source))[0] == "w"


@pytest.mark.parametrize("item", [("w", torch.float32), "w", ("w", "complex64", (2,)), ("w", "float32", "ab")])
def test_metadata_that_is_none_is_refused(item: Any) -> None:
    with pytest.raises(ManifestError):
        metadata_of(Foreign([item]))


def _halve(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Rows as int8 with a scale each; vectors stay."""
    if tensor.dim() < 2:
        return [(name, tensor)]
    scale = tensor.abs().amax(dim=1, keepdim=True) / 127
    return [(name, (tensor / scale).round().to(torch.int8)), (f"{name}_scale", scale)]


def test_parts_travel_in_place_of_a_tensor() -> None:
    weights = {"w": torch.rand(4, 8), "bias": torch.rand(4)}
    source = Encoded(weights, _halve)
    announced = metadata_of(source)
    assert announced == [
        TensorMeta("w", "int8", (4, 8)),
        TensorMeta("w_scale", "float32", (4, 1)),
        TensorMeta("bias", "float32", (4,)),
    ]
    assert announced == list(NamedTensors(source).metadata())
    parts = dict(source)
    torch.testing.assert_close(parts["w"] * parts["w_scale"], weights["w"], atol=0.01, rtol=0)


def test_an_encoder_that_needs_bytes_names_its_parts() -> None:
    def encode(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return [(name, torch.from_numpy(tensor.numpy() * 2))]

    with pytest.raises(ManifestError, match="pass parts="):
        Encoded({"w": torch.ones(2)}, encode).metadata()
    source = Encoded({"w": torch.ones(2)}, encode, parts=lambda meta: [meta])
    assert metadata_of(source) == [TensorMeta("w", "float32", (2,))]
    assert dict(source)["w"].tolist() == [2, 2]


def test_one_tensor_is_encoded_at_a_time() -> None:
    order: list[str] = []

    def encode(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        order.append(name)
        return [(name, tensor)]

    source = iter(Encoded({"a": torch.ones(1), "b": torch.ones(1)}, encode))
    next(source)
    assert order == ["a"]
