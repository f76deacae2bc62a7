"""How the ranks divide a model and a batch among them: the layout keys of `[train.megatron]`, without torch.

Megatron numbers ranks tensor first, then context, then data, then pipeline (its order "tp-cp-ep-dp-pp"): of 8 ranks
with tensor_model_parallel_size = 2 and pipeline_model_parallel_size = 2

    rank                0  1  2  3  4  5  6  7
    tensor rank         0  1  0  1  0  1  0  1
    shard of the batch  0  0  1  1  0  0  1  1
    pipeline stage      0  0  0  0  1  1  1  1

Ranks of one shard hold parts of one copy of the model and must be given the same samples. Experts are divided
differently, over all ranks of a pipeline stage, which takes no part in how a batch is addressed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError

SECTION = "train.megatron"


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the groups that ranks form.

    Attributes:
        world_size: all ranks.
        tensor: ranks that share every layer's matrices.
        pipeline: stages that share the layers.
        context: ranks that share every sequence.
        expert: ranks that share the experts of a layer.
        expert_tensor: ranks that share each expert's matrices.
    """

    world_size: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def num_shards(self) -> int:
        """Into how many shards a batch is dealt: copies of the model."""
        return self.world_size // (self.tensor * self.context * self.pipeline)

    def shard_of(self, rank: int) -> int:
        """Which shard a rank brings to a step, from 0."""
        return rank // (self.tensor * self.context) % self.num_shards


def read_layout(megatron: Mapping[str, Any], world_size: int) -> Layout:
    """The layout that `[train.megatron]` asks of `world_size` ranks.

    Raises:
        InputError: a size is not positive, or sizes do not divide the ranks.
    """
    sizes = {name: megatron.get(key) for name, key in _KEYS.items()}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise InputError(f"{SECTION}.{_KEYS[name]}", size, "must be at least 1", "Correct the value.")
    tensor = sizes["tensor"] or 1
    layout = Layout(
        world_size,
        tensor,
        sizes["pipeline"] or 1,
        sizes["context"] or 1,
        sizes["expert"] or 1,
        sizes["expert_tensor"] or tensor,
    )
    _check_product(layout, ("tensor", "context", "pipeline"))
    if layout.expert > 1 or sizes["expert_tensor"]:
        _check_product(layout, ("expert_tensor", "expert", "pipeline"))
    return layout


_KEYS = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
}


def _check_product(layout: Layout, names: tuple[str, ...]) -> None:
    product = 1
    for name in names:
        product *= getattr(layout, name)
    if layout.world_size % product:
        told = " x ".join(f"{_KEYS[name]} = {getattr(layout, name)}" for name in names if getattr(layout, name) > 1)
        raise InputError(
            "train.num_ranks",
            layout.world_size,
            f"must be a multiple of {told}, {product} ranks",
            "Start as many ranks, or change the sizes.",
        )


def check_layout(megatron: Mapping[str, Any], world_size: int, config: Mapping[str, Any]) -> Layout:
    """Check that the ranks can divide a model.

    Args:
        megatron: `[train.megatron]`, checked by `check_settings`.
        world_size: all ranks.
        config: config.json of the model directory. Sizes are looked up under the names that transformers uses; those
            of modules particular to a family are checked by the family.

    Raises:
        InputError: a size of the model does not divide, or a key needs a model of another kind.
    """
    layout = read_layout(megatron, world_size)
    model = {**config, **config.get("text_config", {})}
    for key, size, names in _divided(layout, model):
        for name in names:
            extent = model.get(name)
            if isinstance(extent, int) and extent % size:
                raise InputError(
                    f"{SECTION}.{key}", size, f"must divide {name} = {extent} of the model", "Choose a size that does."
                )
    _check_stages(megatron, layout, model.get("num_hidden_layers"))
    _check_experts(megatron, layout, has_experts=any(model.get(name) for name in _EXPERTS))
    return layout


_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")


def _divided(layout: Layout, model: Mapping[str, Any]) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Key, size, and what of the model it divides."""
    yield _KEYS["tensor"], layout.tensor, ("num_attention_heads", "intermediate_size")
    # Latent attention has no key-value heads, and DeepSeek-V4 one that all ranks hold, whatever the config says.
    if not model.get("kv_lora_rank") and model.get("model_type") != "deepseek_v4":
        yield _KEYS["tensor"], layout.tensor, ("num_key_value_heads",)
    # Linear attention's heads are divided over context-parallel ranks as well, each with the whole sequence then.
    both = f"{_KEYS['tensor']} * {_KEYS['context']}"
    yield both, layout.tensor * layout.context, ("linear_num_key_heads", "linear_num_value_heads")
    yield _KEYS["expert"], layout.expert, _EXPERTS
    yield _KEYS["expert_tensor"], layout.expert_tensor, ("moe_intermediate_size",)


def _check_stages(megatron: Mapping[str, Any], layout: Layout, num_layers: int | None) -> None:
    """Layers over pipeline stages, and a stage's layers over its virtual stages."""
    uneven = any(key in megatron for key in _UNEVEN)
    for key in (*_VIRTUAL, *_UNEVEN):
        if layout.pipeline == 1 and key in megatron:
            raise InputError(
                f"{SECTION}.{key}",
                megatron[key],
                "has no effect: pipeline_model_parallel_size = 1",
                "Remove the key, or set pipeline_model_parallel_size.",
            )
    if uneven or num_layers is None:
        return  # Megatron's own rules tell
    if num_layers % layout.pipeline:
        raise InputError(
            f"{SECTION}.pipeline_model_parallel_size",
            layout.pipeline,
            f"must divide num_hidden_layers = {num_layers} of the model",
            "Choose a size that does, or set decoder_first_pipeline_num_layers or decoder_last_pipeline_num_layers.",
        )
    per_stage = num_layers // layout.pipeline
    for key in _VIRTUAL:
        if key in megatron and (megatron[key] < 1 or per_stage % megatron[key]):
            raise InputError(
                f"{SECTION}.{key}",
                megatron[key],
                f"must divide the {per_stage} layers of a pipeline stage",
                "Choose a number that does.",
            )


_VIRTUAL = ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage")
_UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
)


def _check_experts(megatron: Mapping[str, Any], layout: Layout, *, has_experts: bool) -> None:
    if has_experts:
        if layout.tensor > 1 and megatron.get("sequence_parallel") is False:
            raise InputError(
                f"{SECTION}.sequence_parallel",
                False,
                f"must be true: Megatron trains experts with tensor_model_parallel_size = {layout.tensor} only if "
                "ranks share the sequence between layers as well",
                "Remove the key.",
            )
        return
    for key in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if megatron.get(key, 1) != 1:
            rule = "must be 1: the model has no experts"
            raise InputError(f"{SECTION}.{key}", megatron[key], rule, "Remove the key.")


def fewest_ranks(megatron: Mapping[str, Any]) -> int:
    """The smallest number of ranks that `[train.megatron]` can divide a model over: one copy of it."""
    size = {name: megatron.get(key) or 1 for name, key in _KEYS.items()}
    dense = size["tensor"] * size["context"] * size["pipeline"]
    expert_tensor = megatron.get(_KEYS["expert_tensor"]) or size["tensor"]
    if size["expert"] == 1 and _KEYS["expert_tensor"] not in megatron:
        return dense
    return math.lcm(dense, expert_tensor * size["expert"] * size["pipeline"])
