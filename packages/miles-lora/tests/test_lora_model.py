"""Adapters on a model: what they compute, what they leave alone, how exactly they go in and out of the weights."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from miles_lora import (
    LoraConfig,
    LoraError,
    LoraLinear,
    adapter_config,
    adapter_state,
    attach,
    detach,
    load_adapter_state,
    mark_trainable,
    merge,
    unmerge,
)

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 20)
        self.o_proj = nn.Linear(20, 12, bias=False)

    def forward(self, x):
        return x + self.o_proj(torch.tanh(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 12)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(12, 7, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TOKENS = torch.tensor([[0, 3, 5, 6, 1]])
CONFIG = LoraConfig(rank=3, alpha=6, targets=["q_proj", "o_proj"])


def model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Model().to(dtype)


def trained(model, config=CONFIG, seed=1, **options):
    """An adapter whose B is no longer zero."""
    attach(model, config, **options)
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


def bits(model):
    return {name: tensor.contiguous().view(torch.uint8).clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- on and off ------------------------------------------------------------------------------------------------------


def test_attaching_changes_nothing_but_adds_names():
    plain = model()
    output, before = plain(TOKENS), bits(plain)
    linears = [plain.layers[0].q_proj, plain.layers[1].o_proj]
    weights = [linear.weight for linear in linears]

    names = attach(plain, CONFIG)

    assert names == ["layers.0.q_proj", "layers.0.o_proj", "layers.1.q_proj", "layers.1.o_proj"]
    assert torch.equal(plain(TOKENS), output)
    after = bits(plain)
    assert set(after) - set(before) == {f"{name}.{side}.weight" for name in names for side in ("lora_A", "lora_B")}
    assert same(before, {name: after[name] for name in before})
    assert linears == [plain.layers[0].q_proj, plain.layers[1].o_proj]
    assert all(linear.weight is weight for linear, weight in zip(linears, weights, strict=True))
    assert adapter_config(plain) == CONFIG


def test_detaching_gives_back_the_same_linears():
    plain = model()
    before, output = bits(plain), plain(TOKENS)
    detach(trained(plain))
    assert same(bits(plain), before) and torch.equal(plain(TOKENS), output)
    assert type(plain.layers[0].q_proj) is nn.Linear
    assert plain.layers[0].q_proj.__dict__.keys() == nn.Linear(1, 1).__dict__.keys()
    attach(plain, CONFIG)


def test_a_checkpoint_of_the_base_still_fits():
    adapted, other = trained(model()), model(seed=9)
    lacking, unexpected = adapted.load_state_dict(other.state_dict(), strict=False)
    assert set(lacking) == set(adapter_state(adapted)) and not unexpected
    detach(adapted)
    assert same(bits(adapted), bits(other))


def test_the_generator_decides_the_start_and_the_global_one_is_left_alone():
    state = torch.get_rng_state()
    starts = []
    for _ in range(2):
        plain = model()
        state = torch.get_rng_state()
        attach(plain, CONFIG, generator=torch.Generator().manual_seed(4))
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(adapter_state(plain))
    assert same(*starts)
    for name, tensor in starts[0].items():
        assert tensor.any() == name.endswith("lora_A.weight")


def test_targets_are_whole_names_last_components_or_one_expression():
    for targets, expected in [
        (["layers.0.q_proj"], ["layers.0.q_proj"]),
        (["0.q_proj", "head"], ["layers.0.q_proj", "head"]),
        (["proj", "head"], None),
        (r"layers\.1\..*", ["layers.1.q_proj", "layers.1.o_proj"]),
    ]:
        config = LoraConfig(rank=1, alpha=1, targets=targets)
        if expected:
            assert attach(model(), config) == expected
        else:
            with pytest.raises(LoraError):
                attach(model(), config)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 8 / 4), (True, 8 / 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula(rslora, scaling, dtype):
    linear = nn.Sequential(nn.Linear(10, 6)).to(dtype)
    config = LoraConfig(rank=4, alpha=8, targets=["0"], rslora=rslora)
    base = copy.deepcopy(linear)
    A, B = trained(linear, config)[0].lora_A.weight, linear[0].lora_B.weight
    x = torch.randn(5, 10).to(dtype)
    assert A.dtype == B.dtype == torch.float32
    expected = (base(x) + (x.float() @ A.T) @ B.T * scaling).to(dtype)
    assert torch.equal(linear(x), expected) and expected.dtype == dtype


def test_dropout_is_for_the_low_rank_path_in_training_alone():
    linear = nn.Sequential(nn.Linear(10, 6)).eval()
    config = LoraConfig(rank=4, alpha=8, targets=["0"], dropout=0.5)
    trained(linear, config)
    x = torch.randn(5, 10)
    assert torch.equal(linear(x), linear(x))  # attached to a model in eval mode, it is in eval mode
    linear.train()
    assert not torch.equal(linear(x), linear(x))
    for tensor in adapter_state(linear).values():
        tensor.zero_()
    assert torch.equal(linear(x), linear(x))


def test_a_subclass_keeps_its_own_forward_and_hooks():
    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    seen = []
    net = nn.Sequential(Doubling(4, 3, bias=False))
    net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 4)
    trained(net, LoraConfig(rank=2, alpha=2, targets=["0"]))
    layer = net[0]
    assert isinstance(layer, Doubling) and isinstance(layer, LoraLinear)
    y = net(x)
    assert torch.allclose(y, 2 * x @ layer.weight.T + x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)
    assert seen[-1] is y
    detach(net)
    assert type(net[0]) is Doubling


def test_copies_and_pickles_carry_the_adapter():
    adapted = trained(model())
    for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(twin(TOKENS), adapted(TOKENS))
        assert same(adapter_state(twin), adapter_state(adapted))
        detach(twin)
    assert adapter_state(adapted)


def test_training_moves_the_adapter_and_nothing_else():
    adapted = model()
    attach(adapted, CONFIG)
    parameters = mark_trainable(adapted)
    assert [parameter.shape for parameter in parameters[:2]] == [(3, 12), (20, 3)]
    assert {id(parameter) for parameter in parameters} == {
        id(parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad
    }
    before = bits(adapted)
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(adapted(TOKENS)[0], TOKENS[0].flip(0))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    changed = {name for name, tensor in bits(adapted).items() if not torch.equal(tensor, before[name])}
    assert changed == set(adapter_state(adapted))


def test_gradients_are_those_of_the_formula():
    net = nn.Sequential(nn.Linear(6, 5, bias=False))
    trained(net, LoraConfig(rank=2, alpha=3, targets=["0"]))
    A, B = mark_trainable(net)
    x, weight = torch.randn(4, 6), net[0].weight.detach()
    net(x).square().sum().backward()
    twin_A, twin_B = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    (x @ (weight + 1.5 * twin_B @ twin_A).T).square().sum().backward()
    assert torch.allclose(A.grad, twin_A.grad, rtol=1e-4) and torch.allclose(B.grad, twin_B.grad, rtol=1e-4)


# --- merged ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 16),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    alpha=st.sampled_from([1, 16, 0.1, 3.7]),
    dtypes=st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2),
    rslora=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merge_rounds_once_and_unmerge_is_exact(rank, size, alpha, dtypes, rslora, seed):
    """|merged - (W + s B A)| is half an ulp of W's dtype, and the float32 rounding of a sum of rank + 1 products."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(*size)).to(dtypes[0])
    trained(net, LoraConfig(rank=rank, alpha=alpha, targets=["0"], rslora=rslora), seed=seed, dtype=dtypes[1])
    layer, before = net[0], bits(net)
    address, weight = layer.weight.data_ptr(), layer.weight.detach().double()
    A, B = (side.weight.detach().double() for side in (layer.lora_A, layer.lora_B))
    scaling = layer.lora_config.scaling

    merge(net)

    exact = weight + scaling * (B @ A)
    terms = weight.abs() + scaling * (B.abs() @ A.abs())
    ulp = torch.finfo(dtypes[0]).eps * exact.abs() + torch.finfo(dtypes[0]).tiny * torch.finfo(dtypes[0]).eps
    bound = ulp / 2 * (1 + 1e-3) + (rank + 3) * 2**-23 * terms
    assert ((layer.weight.double() - exact).abs() <= bound).all()
    assert layer.weight.data_ptr() == address
    assert bits(net).keys() == before.keys()

    unmerge(net)

    assert same(bits(net), before) and layer.weight.data_ptr() == address


def test_merged_and_adapted_models_agree_and_the_plain_export_is_the_merged_one():
    adapted = trained(model())
    adapted_output = adapted(TOKENS)
    merge(adapted)
    merged_output = adapted(TOKENS)
    assert torch.allclose(merged_output, adapted_output, rtol=1e-5, atol=1e-6)
    assert not torch.equal(merged_output, model()(TOKENS))
    merged_bits = bits(adapted)
    detach(adapted)
    assert torch.equal(adapted(TOKENS), merged_output)
    assert same(bits(adapted), {name: merged_bits[name] for name in model().state_dict()})


def test_merge_and_unmerge_forever_never_drift():
    adapted = trained(model(torch.bfloat16))
    before, output = bits(adapted), adapted(TOKENS)
    for _ in range(20):
        merge(adapted)
        unmerge(adapted)
    assert same(bits(adapted), before) and torch.equal(adapted(TOKENS), output)


def test_a_tied_weight_is_not_merged_behind_the_others_back():
    tied = model()
    tied.head.weight = tied.embed.weight
    trained(tied, LoraConfig(rank=2, alpha=2, targets=["head", "q_proj"]))
    before = bits(tied)
    with pytest.raises(LoraError, match=r"head.weight is also embed.weight, which merging would change too"):
        merge(tied)
    assert same(bits(tied), before)


def test_a_broken_adapter_is_not_merged():
    adapted = trained(model())
    adapter_state(adapted)["layers.1.o_proj.lora_A.weight"][0, 0] = torch.nan
    before = bits(adapted)
    with pytest.raises(LoraError, match=r"into layers.1.o_proj.weight gives NaN or infinity"):
        merge(adapted)
    assert same(bits(adapted), before) and not adapted.layers[0].q_proj.merged


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_the_state_is_the_parameters_and_loads_bit_by_bit():
    adapted = trained(model())
    state = adapter_state(adapted)
    assert list(state)[:2] == ["layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight"]
    assert state["layers.0.q_proj.lora_A.weight"].data_ptr() == adapted.layers[0].q_proj.lora_A.weight.data_ptr()
    other = model()
    attach(other, CONFIG)
    load_adapter_state(other, state)
    assert same(adapter_state(other), state) and torch.equal(other(TOKENS), adapted(TOKENS))


def test_a_narrower_dtype_is_widened_but_never_the_reverse():
    narrow = adapter_state(trained(model(), dtype=torch.bfloat16))
    wide = model()
    attach(wide, CONFIG)
    load_adapter_state(wide, narrow)
    assert all(torch.equal(tensor, narrow[name].float()) for name, tensor in adapter_state(wide).items())
    target = trained(model(), dtype=torch.bfloat16)
    with pytest.raises(LoraError, match=r"is torch.float32, the adapter here torch.bfloat16, which would round it"):
        load_adapter_state(target, adapter_state(wide))


def without(state, name):
    return {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: without(state, "layers.0.q_proj.lora_A.weight"), r"lack layers.0.q_proj.lora_A.weight: 8 are"),
        (lambda state: {}, r"lack layers.0.o_proj.lora_A.weight, .* and 5 more: 8 are needed, 0 were given"),
        (lambda state: state | {"head.lora_A.weight": torch.ones(3, 12)}, r"head.lora_A.weight belongs to no target"),
        (
            lambda state: state | {"layers.1.q_proj.lora_B.weight": torch.ones(20, 4)},
            r"lora_B.weight has shape \(20, 4\), the adapter here \(20, 3\): rank \(3 here\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(change, message):
    adapted = trained(model())
    before = bits(adapted)
    state = change({name: tensor.clone() + 1 for name, tensor in adapter_state(adapted).items()})
    with pytest.raises(LoraError, match=message):
        load_adapter_state(adapted, state)
    assert same(bits(adapted), before)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, r"rank=0 must be an integer of at least 1"),
        ({"rank": 2.0}, r"rank=2.0 must be an integer"),
        ({"rank": True}, r"rank=True must be an integer"),
        ({"alpha": 0}, r"alpha=0 must be a finite number above 0"),
        ({"alpha": float("nan")}, r"alpha=nan must be"),
        ({"alpha": "16"}, r"alpha='16' must be"),
        ({"dropout": 1.0}, r"dropout=1.0 must be at least 0 and below 1"),
        ({"targets": []}, r"targets=\[\] must name at least one linear"),
        ({"targets": ["q_proj", ""]}, r"must name at least one linear"),
        ({"targets": [3]}, r"must name at least one linear"),
        ({"targets": "all-linear"}, r"targets='all-linear' is not spelled out: list the linears"),
        ({"targets": "(q_proj"}, r"targets='\(q_proj' is not a regular expression"),
    ],
)
def test_a_config_out_of_range_is_refused(values, message):
    with pytest.raises(LoraError, match=message):
        LoraConfig(**({"rank": 2, "alpha": 4, "targets": ["q_proj"]} | values))


def test_a_config_is_a_value():
    config = LoraConfig(rank=2, alpha=4, targets=["b", "a", "b"])
    assert config.targets == ("a", "b") and config == LoraConfig(rank=2, alpha=4.0, targets=("a", "b"))
    assert len({config, LoraConfig(rank=2, alpha=4, targets=["a", "b"])}) == 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ["q_prog"],
            r"target 'q_prog' matches no module: did you mean 'q_proj'\? the linears .* are head, o_proj, q_proj",
        ),
        (["q_proj", "zzz"], r"target 'zzz' matches no module: the linears"),
        (r"nothing\..*", r"matches no module"),
        (["embed"], r"target embed is of type Embedding: an adapter goes on torch.nn.Linear"),
        (["q_proj", "layers"], r"target layers is of type ModuleList"),
    ],
)
def test_targets_that_do_not_fit_change_nothing(targets, message):
    plain = model()
    with pytest.raises(LoraError, match=message):
        attach(plain, LoraConfig(rank=2, alpha=4, targets=targets))
    assert same(bits(plain), bits(model())) and type(plain.layers[0].q_proj) is nn.Linear


def test_a_linear_that_is_read_and_not_called_is_refused():
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(LoraError, match=r"self_attn.out_proj belongs to torch.nn.MultiheadAttention"):
        attach(attention, LoraConfig(rank=2, alpha=4, targets=["out_proj"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda adapted: attach(adapted, CONFIG), r"target layers.0.q_proj carries an adapter already"),
        (lambda adapted: unmerge(adapted), r"not merged, so there is nothing to take out"),
        (lambda adapted: merge(adapted) or merge(adapted), r"merged into the weights: unmerge\(model\) comes first"),
        (lambda adapted: merge(adapted) or load_adapter_state(adapted, {}), r"unmerge\(model\) comes first"),
        (lambda adapted: detach(adapted) or detach(adapted), r"the model has no adapter"),
        (lambda _: merge(model()), r"the model has no adapter"),
        (lambda _: mark_trainable(model()), r"the model has no adapter"),
        (lambda _: adapter_state(model()), r"the model has no adapter"),
    ],
)
def test_calls_out_of_order_say_which_comes_first(call, message):
    with pytest.raises(LoraError, match=message):
        call(trained(model()))
