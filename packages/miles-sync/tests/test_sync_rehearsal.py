"""Recording a loader: what it would write is known, nothing is written, and replaying it writes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from miles_sync.errors import CommitError, MismatchError
from miles_sync.manifest import Manifest, describe, lay_out
from miles_sync.plan import bind
from miles_sync.receivers import Piece, Pieces
from miles_sync.rehearsal import record

Weights = dict[str, torch.Tensor]


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
                self.bias.data.copy_(weight.to(torch.float32) * 2)


SHAPES = {
    "q": (2, 4),
    "k": (2, 4),
    "v": (2, 4),
    "left": (3, 4),
    "right": (3, 4),
    "vocab": (5, 4),
    "scale": (1,),
    "bias": (4,),
}


def _sources() -> Weights:
    return {name: torch.rand(shape) for name, shape in SHAPES.items()}


def _manifest(sources: Weights) -> Manifest:
    return lay_out([describe(name, tensor) for name, tensor in sources.items()], 0)


def _state(model: torch.nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _replay(model: torch.nn.Module, sources: Weights, *, cut: int | None = None) -> None:
    """Record, and install every tensor, in runs of `cut` elements if asked to."""
    manifest = _manifest(sources)
    bound = bind(record(model, manifest), manifest, model)
    bound.begin()
    for index, tensor in enumerate(sources.values()):
        flat = tensor.reshape(-1)
        step = cut or max(flat.numel(), 1)
        bound.install(Pieces([Piece(index, at, flat[at : at + step]) for at in range(0, flat.numel(), step)]))
    bound.finish()


def test_recording_changes_nothing_and_replaying_is_loading() -> None:
    model = Fused()
    before = _state(model)
    sources = _sources()
    plan = record(model, _manifest(sources))
    assert _equal(before, _state(model))
    assert plan.through_loader == {"bias": "bias is computed (aten.mul.Tensor)"}
    for cut in (None, 1, 3, 5):
        loaded, replayed = copy.deepcopy(model), copy.deepcopy(model)
        loaded.load_weights(list(sources.items()))
        _replay(replayed, sources, cut=cut)
        assert _equal(_state(loaded), _state(replayed))


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
    with pytest.raises(MismatchError, match=rf"no tensor writes \(all of\) the parameter: {parameter}"):
        record(Fused(), _manifest(sources))


def test_what_is_ignored_is_named() -> None:
    with pytest.raises(MismatchError, match=r"takes no such tensor: rotary\.frequencies"):
        record(Fused(), _manifest(_sources() | {"rotary.frequencies": torch.rand(3)}))


def test_what_is_known_to_be_left_out_is_explained() -> None:
    plan = record(Fused(), _manifest(_sources() | {"model.rotary_emb.inv_freq": torch.rand(3)}))
    assert plan.skipped == {"model.rotary_emb.inv_freq": "computed from the configuration"}


@pytest.mark.parametrize(("name", "shape"), [("bias", (5,)), ("q", (3, 4)), ("left", (3, 5)), ("vocab", (9, 4))])
def test_what_the_loader_refuses_is_told_in_its_words(name: str, shape: tuple[int, ...]) -> None:
    model = Fused()
    before = _state(model)
    with pytest.raises(MismatchError, match="loader objects"):
        record(model, _manifest(_sources() | {name: torch.rand(shape)}))
    assert _equal(before, _state(model))


class Loading(torch.nn.Module):
    """Two parameters, and the loader that a test gives it."""

    def __init__(self, load: Callable[[Loading, Weights], None]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(6, 4))
        self.other = torch.nn.Parameter(torch.rand(4, dtype=torch.float64))
        self._load = load

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self._load(self, dict(weights))


def _loads(*statements: str) -> Callable[[Loading, Weights], None]:
    """A loader of these statements over `m` and `w`."""
    code = compile("\n".join(statements), "loader", "exec")

    def load(model: Loading, weights: Weights) -> None:
        exec(code, {"m": model, "w": weights, "torch": torch, "ThreadPoolExecutor": ThreadPoolExecutor})

    return load


OTHER = "if 'b' in w: m.other.data.copy_(w['b'])"


@pytest.mark.parametrize(
    "statement",
    [
        "m.weight.data.copy_(w['a'].t())",
        "m.weight.data.copy_(w['a'].t().contiguous())",
        "m.weight.data.copy_(w['a'].clone().t())",
        "m.weight.data.copy_(w['a'].view(2, 2, 6).transpose(0, 1).reshape(4, 6).t())",
        "m.weight.data.copy_(w['a'].t().clone())",
        "m.weight.data.copy_(w['a'].view(2, 2, 2, 3).permute(2, 0, 3, 1).reshape(4, 6).t())",
        "m.weight.data.copy_(w['a'].view(2, 2, 6).transpose(0, 1).reshape(24)[:].view(4, 6).t())",
        "q, r = w['a'].view(2, 2, 6).split(1, dim=1); m.weight.data.copy_(torch.cat([q, r]).reshape(4, 6).t())",
        "m.weight.data.copy_(torch.cat([w['a'][:1], w['a'][1:]]).t())",
        "m.weight.data.copy_(torch.cat([w['a'][:, 3:], w['a'][:, :3]], dim=1).t())",
        "c = torch.cat([w['a'][:1], w['a'][1:]]).contiguous(); m.weight.data.narrow(1, 0, 3).copy_(c[:3].t());"
        "m.weight.data.narrow(1, 3, 1).copy_(c[3:].t())",
        "m.weight.data.copy_(torch.stack([w['a'][i] for i in range(4)], dim=1))",
        "m.weight.data.copy_(w['a'].double().t())",
        "m.weight.data.copy_(w['a'].to('cpu').t())",
        "m.weight.data.view(-1).copy_(w['a'].reshape(-1))",
        "[m.weight.data[i].copy_(w['a'][:, i]) for i in range(6)]",
        "with ThreadPoolExecutor() as p: list(p.map(lambda i: m.weight.data[i].copy_(w['a'][:, i]), range(6)))",
    ],
)
def test_rearrangements_are_replayed_as_copies(statement: str) -> None:
    model = Loading(_loads(statement, OTHER))
    sources = {"a": torch.rand(4, 6), "b": torch.rand(4)}
    plan = record(model, _manifest(sources))
    assert not plan.through_loader
    for cut in (None, 1, 7):
        loaded, replayed = copy.deepcopy(model), copy.deepcopy(model)
        loaded.load_weights(list(sources.items()))
        _replay(replayed, sources, cut=cut)
        assert _equal(_state(loaded), _state(replayed)), cut


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("m.weight.data.copy_(w['a'].t() * 2)", "mul"),
        ("m.weight.data.copy_(w['a'].half().t())", "rounded"),
        ("m.weight.data.copy_(w['a'].t()); m.weight.data.copy_(m.weight.exp())", "copy_"),
        ("m.weight.data.copy_(w['a'].t()); m.weight.data.mul_(3)", "mul_"),
        ("b = torch.empty(6, 4); b.copy_(w['a'].t()); m.weight.data.copy_(b)", "copy_"),
        ("m.weight.data.copy_(w['a'].flip(0).t())", "flip"),
        ("m.weight.data.copy_(w['a'].view(torch.int32).view(torch.float32).t())", "bytes read"),
    ],
)
def test_arithmetic_goes_through_the_loader_by_name(statement: str, why: str) -> None:
    model = Loading(_loads(f"if 'a' in w: {statement}", OTHER))
    sources = {"a": torch.rand(4, 6), "b": torch.rand(4)}
    before = _state(model)
    plan = record(model, _manifest(sources))
    assert _equal(before, _state(model))
    assert list(plan.through_loader) == ["a"] and why in plan.through_loader["a"]
    loaded, replayed = copy.deepcopy(model), copy.deepcopy(model)
    loaded.load_weights(list(sources.items()))
    _replay(replayed, sources, cut=5)
    assert _equal(_state(loaded), _state(replayed))


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("m.weight.data.copy_(w['a'].t()); m.weight.data[0].copy_(w['a'][:, 0])", "more than one tensor writes"),
        ("m.weight.data[:, :3].copy_(w['a'].t()[:, :3])", "no tensor writes"),
        ("m.weight.data.copy_(w['a'].t()); m.cache = m.weight.sum()", "no post_load_weights"),
        ("m.weight.data.copy_(w['a'].t() if w['a'].sum() > 0 else w['a'].t() * 2)", "loader objects"),
        ("m.weight.data = w['a'].t()", "loader objects"),
    ],
)
def test_what_cannot_be_replayed_is_refused(statement: str, text: str) -> None:
    model = Loading(_loads(statement, OTHER))
    before = _state(model)
    with pytest.raises(MismatchError, match=text):
        record(model, _manifest({"a": torch.rand(4, 6), "b": torch.rand(4)}))
    assert _equal(before, _state(model))


def test_what_is_used_in_part_is_refused_unless_ranks_share_it() -> None:
    model = Loading(_loads("m.weight.data.copy_(w['a'][:6])", OTHER))
    manifest = _manifest({"a": torch.rand(12, 4), "b": torch.rand(4)})
    with pytest.raises(MismatchError, match="only a part is used of: a"):
        record(model, manifest)
    assert list(record(model, manifest, sliced=True).partial) == ["a"]


def test_what_a_model_derives_is_derived_again() -> None:
    class Deriving(Loading):
        def __init__(self) -> None:
            super().__init__(_loads("m.weight.data.copy_(w['a'].t())", OTHER, "m.post_load_weights()"))
            self.total = torch.zeros(())
            self.fails = False

        def post_load_weights(self) -> None:
            if self.fails:
                raise RuntimeError("no memory")
            self.total.copy_(self.weight.detach().sum())

    model = Deriving()
    sources = {"a": torch.rand(4, 6), "b": torch.rand(4)}
    assert record(model, _manifest(sources)).refreshes
    _replay(model, sources)
    assert torch.equal(model.total, model.weight.detach().sum())
    model.fails = True
    manifest = _manifest(sources)
    model.fails = False
    bound = bind(record(model, manifest), manifest, model)
    model.fails = True
    with pytest.raises(CommitError, match="no memory"):
        bound.finish()


def test_a_loader_may_take_the_weights_as_a_stream() -> None:
    class Streaming(Loading):
        def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
            def renamed() -> Iterator[tuple[str, torch.Tensor]]:
                for name, weight in weights:
                    yield name.removeprefix("model."), weight

            super().load_weights(list(renamed()))

    model = Streaming(_loads("m.weight.data.copy_(w['a'].t())", OTHER))
    _replay(model, {"model.a": torch.ones(4, 6), "b": torch.rand(4)})
    assert model.weight.eq(1).all()
