"""From a spec to this rank's model: one `GPTModel` for each of its pipeline chunks.

Why `GPTModel`, which 0.19 calls deprecated in favour of `HybridModel`: in 0.19.2 `HybridStack` builds its final norm
from Transformer Engine unconditionally, which needs a GPU; `HybridModel` takes no rotary scaling, gives every layer of
one kind the same spec, and has no `output_processor`, the hook through which `step` turns hidden states into logprobs
without ever holding all logits. A `GPTModel` also has the parameter names that other Megatron tools know.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron.specs.backend import BackendSpecProvider, backend_of, settle
from miles_train.megatron.specs.embedding import hold_padding_row
from miles_train.megatron.upstream import (
    GPTModel,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    core_transformer_config_from_args,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    gpt_model,
    parallel_state,
)

Config = Mapping[str, Any]


def _unchanged(model: GPTModel, config: Config) -> None:
    """Nothing to do after construction."""


def _no_mtp(config: Config, transformer: TransformerConfig, backend: BackendSpecProvider) -> None:
    """No multi-token prediction."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One architecture in Megatron.

    Attributes:
        arguments: Megatron's arguments for config.json; also such as only `TransformerConfig` has.
        layers: a module spec for each decoder layer of the whole model, in order.
        finish: last touches to a built chunk (rotary frequencies that the constructor does not know).
        mtp: the block of multi-token prediction layers, or None where the model has none.
        model: the class to build.
    """

    arguments: Callable[[Config], dict[str, Any]]
    layers: Callable[[Config, TransformerConfig, BackendSpecProvider], list[ModuleSpec]]
    finish: Callable[[GPTModel, Config], None] = _unchanged
    mtp: Callable[[Config, TransformerConfig, BackendSpecProvider], ModuleSpec | None] = _no_mtp
    model: type[GPTModel] = GPTModel


def build_chunks(spec: Spec, config: Config, args: argparse.Namespace) -> list[GPTModel]:
    """Build this rank's pipeline chunks, their weights uninitialised.

    Args:
        spec: the architecture.
        config: config.json.
        args: Megatron's arguments, among them those of `spec.arguments`.

    Raises:
        InputError: the spec has no layers for this layout, or another number of them.
    """
    transformer = core_transformer_config_from_args(args)
    backend = backend_of(args.transformer_impl)
    layers = spec.layers(config, transformer, backend)
    if len(layers) != transformer.num_layers:
        rule = f"must be num_layers = {transformer.num_layers} module specs, one for each layer of the model"
        raise InputError("the spec's layers", len(layers), rule, "Correct `layers` of the family.")
    mtp = spec.mtp(config, transformer, backend)
    num_chunks = args.virtual_pipeline_model_parallel_size
    stages = [None] if num_chunks is None else list(range(num_chunks))
    with _without_deprecation_notice():
        return [_build_chunk(spec, config, args, transformer, backend, layers, mtp, stage) for stage in stages]


def _build_chunk(
    spec: Spec,
    config: Config,
    args: argparse.Namespace,
    transformer: TransformerConfig,
    backend: BackendSpecProvider,
    layers: list[ModuleSpec],
    mtp: ModuleSpec | None,
    stage: int | None,
) -> GPTModel:
    first = get_transformer_layer_offset(transformer, vp_stage=stage)
    mine = layers[first : first + get_num_layers_to_build(transformer, vp_stage=stage)]
    # Typed as ModuleSpec upstream, which documents a block's submodules as well.
    block: Any = TransformerBlockSubmodules(layer_specs=mine, layer_norm=backend.layer_norm(rms_norm=True))
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    model = spec.model(
        transformer,
        block,
        vocab_size=-(-args.vocab_size // multiple) * multiple,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        mtp_block_spec=mtp,
        vp_stage=stage,
    )
    spec.finish(model, config)
    hold_padding_row(model, config)
    settle(model, transformer)
    return model


@contextmanager
def _without_deprecation_notice() -> Iterator[None]:
    """Keep the notice that this module's docstring answers out of every start."""

    def other(record: logging.LogRecord) -> bool:
        return "GPTModel IS DEPRECATED" not in record.getMessage()

    gpt_model.logger.addFilter(other)
    try:
        yield
    finally:
        gpt_model.logger.removeFilter(other)
