"""Rehearsing a loader: what it would write is known, and nothing is written."""

from __future__ import annotations

import copy

import pytest
import torch

from miles_sync.errors import MismatchError
from miles_sync.rehearsal import rehearse


class Fused(torch.nn.Module):
    """Loads the ways engines do: fused rows, sliced columns, padding, scalars, casts, tied heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(4, 6, bias=False)
        self.columns = torch.nn.Parameter(torch.rand(3, 8))
        self.vocab = torch.nn.Embedding(8, 4)  # padded from 5
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.vocab.weight
        self.scale = torch.nn.Parameter(torch.rand(1))
        self.bias = torch.nn.Parameter(torch.rand(4))

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, weight in weights:
            if name in ("q", "k", "v"):
                start = 2 * "qkv".index(name)
                self.qkv.weight.data.narrow(0, start, 2).copy_(weight)
            elif name in ("left", "right"):
                start = 0 if name == "left" else 4
                self.columns.data[:, start : start + 4].copy_(weight)
            elif name == "vocab":
                self.vocab.weight[:5].data.copy_(weight)
                self.vocab.weight[5:].data.fill_(0)
            elif name == "scale":
                self.scale.data.fill_(weight.item())
            elif name == "bias":
                assert weight.shape == self.bias.shape
                self.bias.data.copy_(weight.to(torch.float32) * 1)


def _sources() -> dict[str, torch.Tensor]:
    flat = torch.rand(200)  # as in staging: all in one storage, so that only the address tells them apart
    shapes = {
        "q": (2, 4),
        "k": (2, 4),
        "v": (2, 4),
        "left": (3, 4),
        "right": (3, 4),
        "vocab": (5, 4),
        "scale": (1,),
        "bias": (4,),
    }
    sources, start = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        sources[name] = flat[start : start + count].view(shape)
        start += count
    return sources


def test_complete_weights_pass_and_nothing_is_written() -> None:
    model = Fused()
    before = copy.deepcopy(model.state_dict())
    found = rehearse(model, _sources())
    assert (found.ignored, found.unwritten) == ((), ())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_weights(list(_sources().items()))
    assert not torch.equal(model.bias, before["bias"])


@pytest.mark.parametrize(
    ("left_out", "parameter"),
    [
        ("q", "qkv.weight"),
        ("v", "qkv.weight"),
        ("right", "columns"),
        ("vocab", "vocab.weight"),
        ("scale", "scale"),
        ("bias", "bias"),
    ],
)
def test_what_is_left_out_is_named(left_out: str, parameter: str) -> None:
    sources = {name: tensor for name, tensor in _sources().items() if name != left_out}
    assert rehearse(Fused(), sources).unwritten == (parameter,)


def test_what_is_ignored_is_named() -> None:
    found = rehearse(Fused(), _sources() | {"rotary.inv_freq": torch.rand(3)})
    assert (found.ignored, found.unwritten) == (("rotary.inv_freq",), ())


@pytest.mark.parametrize(("name", "shape"), [("bias", (5,)), ("q", (3, 4)), ("left", (3, 5)), ("vocab", (9, 4))])
def test_what_the_loader_refuses_is_told_in_its_words(name: str, shape: tuple[int, ...]) -> None:
    model = Fused()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MismatchError, match="loader objects"):
        rehearse(model, _sources() | {name: torch.rand(shape)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_loader_that_swaps_storage_is_undone() -> None:
    class Swapping(torch.nn.Linear):
        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
            self.weight.data = weights[0][1]

    model = Swapping(2, 2, bias=False)
    before = model.weight.detach().clone()
    found = rehearse(model, {"weight": torch.rand(2, 2)})
    assert found.unwritten == ("weight",)
    assert torch.equal(model.weight, before)
