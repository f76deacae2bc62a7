"""Adapters on a whole model: on and off, trainable, merged, and as named tensors."""

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from miles_lora.config import LoraConfig, target_names
from miles_lora.errors import LoraError
from miles_lora.layer import LoraLinear, make_lora, require_linear, unmake_lora


def attach(
    model: nn.Module,
    config: LoraConfig,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Put an adapter on every target, in place. The model's output does not change until the adapter is trained.

    Base weights keep their names, addresses and `requires_grad`; see `mark_trainable`.

    Args:
        model: Any module; the targets are looked up in `model.named_modules()`.
        config: Which linears, and the adapter's size.
        dtype: Of A and B.
        generator: Where A's first values come from, on the device of the weights; torch's global one if None. Ranks
            that must agree pass one with the same seed.

    Returns:
        Names of the targets, in the model's order.

    Raises:
        LoraError: A target that matches nothing, is no linear or has an adapter already. The model is as before.
    """
    targets = _find_targets(model, config)
    for linear in targets.values():
        make_lora(linear, config, dtype, generator)
    return list(targets)


def detach(model: nn.Module) -> None:
    """Take the adapter off, in place: the same linears as before `attach`.

    Weights that are merged stay merged, and what they were is forgotten: `merge(model); detach(model)` makes the plain
    model that is to be exported. For the base model, `unmerge` first. `requires_grad` is left as it is.

    Raises:
        LoraError: There is no adapter.
    """
    for layer in _layers(model).values():
        unmake_lora(layer)


def mark_trainable(model: nn.Module) -> list[nn.Parameter]:
    """Freeze every parameter but A and B, and return those, in the model's order, for an optimizer.

    Raises:
        LoraError: There is no adapter.
    """
    layers = _layers(model)
    model.requires_grad_(False)
    adapters = nn.ModuleList(side for layer in layers.values() for side in (layer.lora_A, layer.lora_B))
    return list(adapters.requires_grad_(True).parameters())


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold the adapter into the weights, in place: W becomes W + scaling * B A, computed in float32 and rounded once.

    In float32 the merged model's outputs differ from the adapted one's by float32 rounding. In bfloat16 the weight has
    8 significant bits, and a change below half an ulp of W (2^-9 |W|) disappears: push such an adapter by itself, or
    merge into float32.

    Costs a second copy of the merged weights until `unmerge` or `detach`. Weights keep their addresses. While merged,
    A and B receive no gradient.

    Raises:
        LoraError: No adapter; merged already; a weight that another module shares, which would change too; NaN or
            infinity in the result. The model is as before.
    """
    layers = _layers(model)
    _require_unmerged(layers)
    _require_unshared(model, layers)
    merged = {name: layer.merged_weight() for name, layer in layers.items()}
    for name, weight in merged.items():
        if not bool(torch.isfinite(weight).all()):
            raise LoraError(
                f"merging into {name}.weight gives NaN or infinity: check the optimizer step that wrote the adapter"
            )
    for name, layer in layers.items():
        layer.put_in(merged.pop(name))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Take the adapter out of the weights again: exactly the bytes they had before `merge`.

    They are copied back, not computed: subtracting what was added leaves rounding behind.

    Raises:
        LoraError: No adapter, or it is not merged.
    """
    layers = _layers(model)
    if not all(layer.merged for layer in layers.values()):
        raise LoraError("the adapter is not merged, so there is nothing to take out: merge(model) comes first")
    for layer in layers.values():
        layer.take_out()


def adapter_config(model: nn.Module) -> LoraConfig:
    """The config that the model's adapter was attached with.

    Raises:
        LoraError: There is no adapter.
    """
    return next(iter(_layers(model).values())).lora_config


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by name: `<module>.lora_A.weight` `[rank, in]` and `<module>.lora_B.weight` `[out, rank]`.

    Detached and sharing memory with the parameters: clone them to keep them over a training step.

    Raises:
        LoraError: There is no adapter.
    """
    return {
        f"{name}.{side}.weight": getattr(layer, side).weight.detach()
        for name, layer in _layers(model).items()
        for side in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors named as `adapter_state` names them into the attached adapter.

    Raises:
        LoraError: No adapter, or it is merged; a tensor is missing, unknown, of another shape or of a dtype that this
            adapter's cannot hold. Nothing is copied then.
    """
    layers = _layers(model)
    _require_unmerged(layers)
    own = adapter_state(model)
    if missing := sorted(own.keys() - state.keys()):
        raise LoraError(f"the adapter's tensors lack {_some(missing)}: {len(own)} are needed, {len(state)} were given")
    if unknown := sorted(state.keys() - own.keys()):
        raise LoraError(f"{_some(unknown)} belongs to no target of this adapter: it has {len(own)} tensors")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise LoraError(
                f"{name} has shape {tuple(tensor.shape)}, the adapter here {tuple(own[name].shape)}: rank "
                f"({adapter_config(model).rank} here) and base model must be those it was trained with"
            )
        if torch.promote_types(tensor.dtype, own[name].dtype) != own[name].dtype:
            raise LoraError(
                f"{name} is {tensor.dtype}, the adapter here {own[name].dtype}, which would round it: attach with "
                f"dtype={tensor.dtype}, or convert it yourself"
            )
    for name, tensor in state.items():
        own[name].copy_(tensor)


def _find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """The linears that the config names, all of them fit to carry an adapter."""
    modules = dict(model.named_modules())
    found = [name for name in modules if name and config.matches(name)]
    wanted = [config.targets] if isinstance(config.targets, str) else config.targets
    for target in wanted:
        if not (found if isinstance(config.targets, str) else any(target_names(target, name) for name in found)):
            raise LoraError(_no_match(target, modules))
    return {name: require_linear(name, modules[name], modules[name.rpartition(".")[0]]) for name in found}


def _no_match(target: str, modules: Mapping[str, nn.Module]) -> str:
    linears = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
    near = difflib.get_close_matches(target.rpartition(".")[2], linears, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"target {target!r} matches no module: {hint}the linears of this model are {', '.join(linears) or 'none'}"


def _layers(model: nn.Module) -> dict[str, LoraLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    if not layers:
        raise LoraError("the model has no adapter: attach(model, config) or load_peft(model, directory) comes first")
    return layers


def _require_unmerged(layers: Mapping[str, LoraLinear]) -> None:
    if any(layer.merged for layer in layers.values()):
        raise LoraError("the adapter is merged into the weights: unmerge(model) comes first")


def _require_unshared(model: nn.Module, layers: Mapping[str, LoraLinear]) -> None:
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, layer in layers.items():
        others = [other for other in names[layer.weight] if other != f"{name}.weight"]
        if others:
            raise LoraError(
                f"{name}.weight is also {', '.join(others)}, which merging would change too: untie them, or leave "
                f"{name} out of the targets"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
