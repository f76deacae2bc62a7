"""What a family supports, asked of its spec: nothing here knows any family by name.

A spec refuses the layouts that its modules cannot do when it is asked for its layers, and Megatron's own rules and
`check_layout` refuse others. So each layout is tried as a trainer would begin to, up to the point where modules are
built: no process groups, no memory, milliseconds.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron import cpu_shim, runtime
from miles_train.megatron._environment import quietly
from miles_train.megatron.arguments import parse_arguments
from miles_train.megatron.layout import check_layout, fewest_ranks
from miles_train.megatron.settings import check_settings
from miles_train.megatron.specs.backend import backend_of
from miles_train.megatron.specs.build import Spec
from miles_train.megatron.upstream import ModuleSpec, TopKRouter, core_transformer_config_from_args

_TENSOR = {"tensor_model_parallel_size": 2}
_PIPELINE = {"pipeline_model_parallel_size": 2}
# Each is tried in float32; a layout counts if one of its settings is taken.
LAYOUTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "tp": (_TENSOR, {**_TENSOR, "sequence_parallel": False}),
    "sp": ({**_TENSOR, "sequence_parallel": True},),
    "pp": (_PIPELINE,),
    "vpp": ({**_PIPELINE, "num_virtual_stages_per_pipeline_rank": 2},),
    "ep": ({"expert_model_parallel_size": 2},),
    "etp": ({**_TENSOR, "expert_tensor_parallel_size": 2},),
    "cp": ({"context_parallel_size": 2},),
}
PRECISIONS: Mapping[str, Mapping[str, Any]] = {"float32": {}, "bfloat16": {"bf16": True}}
_NUM_LAYERS = 8  # divides over stages and virtual stages


@dataclass(frozen=True, slots=True)
class Support:
    """What can be done with a family.

    Attributes:
        layouts: names of `LAYOUTS` to the reason against each; None where there is none.
        precisions: names of `PRECISIONS`, likewise.
        packing: why sequences cannot be packed, or None.
        routing_replay: why recorded routes cannot be replayed, or None.
        experts: whether there are any.
    """

    layouts: Mapping[str, str | None]
    precisions: Mapping[str, str | None]
    packing: str | None
    routing_replay: str | None
    experts: bool


def support_of(spec: Spec, config: Mapping[str, Any]) -> Support:
    """Ask a family.

    Args:
        spec: of the family.
        config: config.json of one of its models, of any size.

    Raises:
        InputError: the config is not one that it reads.
    """
    if runtime.device_of_this_process().type != "cuda":
        cpu_shim.install()
    config = shortened(config)
    classes = set(_classes(_layers(spec, config, {})))
    refusing = sorted(cls.__name__ for cls in classes if not getattr(cls, "supports_packing", True))
    routers = [cls for cls in classes if issubclass(cls, TopKRouter)]
    replay = None
    if not routers:
        replay = "it has no router of Megatron's"
    elif importlib.util.find_spec("miles_train.megatron.replay") is None:
        replay = "this trainer takes no recorded routes"
    return Support(
        layouts={name: _reason(spec, config, tries) for name, tries in LAYOUTS.items()},
        precisions={name: _reason(spec, config, (settings,)) for name, settings in PRECISIONS.items()},
        packing=f"{', '.join(refusing)} cannot keep packed sequences apart" if refusing else None,
        routing_replay=replay,
        experts=bool(routers),
    )


def shortened(config: Mapping[str, Any], num_layers: int = _NUM_LAYERS) -> dict[str, Any]:
    """A config of fewer layers: what it says of each layer is cut as well."""
    before = config.get("num_hidden_layers")
    short = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = shortened(value, num_layers)
        elif isinstance(value, list) and before is not None and len(value) == before:
            value = value[:num_layers]
        short[key] = value
    return {**short, "num_hidden_layers": num_layers} if before is not None else short


def _reason(spec: Spec, config: Mapping[str, Any], tries: tuple[Mapping[str, Any], ...]) -> str | None:
    """Why none of the settings is taken; None if one is."""
    reason = None
    for settings in tries:
        try:
            _layers(spec, config, settings)
        except InputError as error:
            reason = reason or error.rule
        else:
            return None
    return reason


def _layers(spec: Spec, config: Mapping[str, Any], settings: Mapping[str, Any]) -> list[ModuleSpec]:
    """The module specs of all layers, as a trainer with these settings would build them."""
    megatron = {"lr": 1e-6, **settings}
    check_settings(megatron)
    layout = check_layout(megatron, fewest_ranks(megatron), config)
    args = parse_arguments(megatron, spec.arguments(config), rank=0, layout=layout, seed=0, on_gpu=False)
    with quietly():
        return spec.layers(config, core_transformer_config_from_args(args), backend_of(args.transformer_impl))


def _classes(part: Any) -> Iterator[type]:
    """Every module class that a spec names, however deep."""
    if isinstance(part, type):
        yield part
    elif isinstance(part, partial):
        yield from _classes(part.func)
        yield from _classes([*part.args, *part.keywords.values()])
    elif isinstance(part, ModuleSpec):
        yield from _classes([part.module, part.submodules, *(part.params or {}).values()])
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _classes(item)
    elif is_dataclass(part):
        yield from _classes([getattr(part, item.name) for item in fields(part)])
