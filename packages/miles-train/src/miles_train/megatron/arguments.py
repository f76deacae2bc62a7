"""`[train.megatron]` through Megatron's own parser and rules, in the trainer's process."""

import argparse
import contextlib
import io
import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from miles_core.errors import InputError
from miles_train.megatron._environment import quietly
from miles_train.megatron.layout import Layout
from miles_train.megatron.settings import SECTION, TESTED_VERSION, known_arguments
from miles_train.megatron.specs.backend import TRANSFORMER_ENGINE, choose_implementation
from miles_train.megatron.upstream import add_megatron_arguments, validate_args

_logger = logging.getLogger(__name__)


def parse_arguments(
    megatron: Mapping[str, Any], model: Mapping[str, Any], *, rank: int, layout: Layout, seed: int, on_gpu: bool
) -> argparse.Namespace:
    """Make Megatron's argument namespace.

    Args:
        megatron: `[train.megatron]`, checked by `check_settings`.
        model: arguments derived from the model directory.
        rank: this process.
        layout: that of all ranks (`check_layout`).
        seed: of Megatron's random states.
        on_gpu: whether the model lives on a GPU; without one the CPU shim must be installed.

    Raises:
        InputError: a key is derived from this model, Megatron's parser refuses a value, or its rules refuse the
            combination.
    """
    _refuse_derived(megatron, model)
    parser = _parser()
    args = parser.parse_args(_command_line(parser, megatron))
    implementation = _implementation(megatron, on_gpu)
    vars(args).update(_defaults(megatron, layout) | _fusions(implementation, megatron, model) | dict(model))
    vars(args).update(_owned(layout, seed, on_gpu), transformer_impl=implementation)
    args.rank, args.world_size = rank, layout.world_size
    # Nothing reads it but a rule that it divides; sequences are padded to what divides (see `logprobs`).
    args.seq_length -= args.seq_length % (2 * layout.context)
    if on_gpu and layout.tensor * layout.context > 1:
        # Kernels then start in the order they were launched in, which overlaps communication with what follows.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()), quietly():  # it prints all 800 arguments
            validate_args(args)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise InputError(
            SECTION, dict(megatron), f"Megatron refuses the combination: {error}", "Change the keys it names."
        ) from None
    # Stages tell each other the shape of every tensor they pass on: micro-batches differ in it.
    args.variable_seq_lengths = layout.pipeline > 1
    return args


def _refuse_derived(megatron: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """`settings.DERIVED` lists what the families here derive; one from elsewhere may derive more."""
    for key, value in megatron.items():
        if known_arguments()[key].dest in model:
            raise InputError(
                f"{SECTION}.{key}", value, "it is derived from config.json of the model directory", "Remove the key."
            )


def describe_parser() -> list[dict[str, Any]]:
    """What the installed parser knows, as `settings.known_arguments` reads it."""
    return [_describe(action) for action in _parser()._actions if action.dest != "help"]


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> Any:
        raise InputError(SECTION, "...", f"Megatron's parser says: {message}", "Correct the value.")


@cache
def _parser() -> argparse.ArgumentParser:
    with contextlib.redirect_stdout(io.StringIO()):
        return add_megatron_arguments(_Parser(allow_abbrev=False))


def _describe(action: argparse.Action) -> dict[str, Any]:
    kinds = {"_StoreTrueAction": "true", "_StoreFalseAction": "false", "BooleanOptionalAction": "bool"}
    kind = kinds.get(type(action).__name__, "value")
    names = {int: "int", float: "float", str: "str", None: "str"}
    flags = [option.lstrip("-").replace("-", "_") for option in action.option_strings]
    choices = None if action.choices is None else [getattr(choice, "name", str(choice)) for choice in action.choices]
    return {
        "dest": action.dest,
        "flags": sorted({flag for flag in flags if flag != action.dest}),
        "kind": kind,
        # A type may be any callable: only the builtins can be checked by name.
        "type": names.get(action.type, "any") if kind == "value" else "bool",
        "many": action.nargs in ("+", "*") or (kind == "value" and isinstance(action.nargs, int)),
        "choices": choices,
    }


def _command_line(parser: argparse.ArgumentParser, megatron: Mapping[str, Any]) -> list[str]:
    by_name: dict[str, argparse.Action] = {}
    for action in parser._actions:
        for name in (action.dest, *(option.lstrip("-").replace("-", "_") for option in action.option_strings)):
            by_name.setdefault(name, action)
    line: list[str] = []
    for key, value in megatron.items():
        action = by_name[key]
        kind = _describe(action)["kind"]
        if kind == "value":
            values = value if isinstance(value, list) else [value]
            line += [action.option_strings[0], *map(str, values)]
        elif kind == "bool":
            line.append(action.option_strings[0 if value else 1])
        elif value == (kind == "true" or key != action.dest):  # a flag's own name means giving it
            line.append(action.option_strings[0])
    return line


def _implementation(megatron: Mapping[str, Any], on_gpu: bool) -> str:
    """`transformer_impl`: what was asked for, or what the machine has."""
    chosen, reason = choose_implementation(on_gpu=on_gpu, bf16=bool(megatron.get("bf16")))
    asked = megatron.get("transformer_impl", chosen)
    if asked == TRANSFORMER_ENGINE and chosen != TRANSFORMER_ENGINE:
        raise InputError(f"{SECTION}.transformer_impl", asked, reason, "Remove the key.")
    if on_gpu and asked == chosen != TRANSFORMER_ENGINE:
        _logger.warning("the model is built without Transformer Engine, which is slower: %s", reason)
    return asked


def _fusions(implementation: str, megatron: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, bool]:
    """Fused kernels that compute the same; a model may say otherwise, and of grouped products the user.

    Latent attention rotates part of a head in a way of its own. The fused SwiGLU leaves out a clamp, without a word.
    """
    fused = implementation == TRANSFORMER_ENGINE
    ours = {
        "apply_rope_fusion": fused and not model.get("multi_latent_attention"),
        "bias_swiglu_fusion": fused and model.get("activation_func_clamp_value") is None,
        "moe_permute_fusion": fused,
        "moe_grouped_gemm": fused and "num_experts" in model,
    }
    return {key: value for key, value in ours.items() if key not in megatron}


def _defaults(megatron: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Where this trainer's default is not Megatron's.

    Megatron's schedule decays over the run by default, whose length a trainer does not know; it pads the vocabulary to
    a multiple of 128 for its GPU kernels, eight times the work for a vocabulary of 16; it leaves activations between
    tensor-parallel layers whole, which costs memory and which mixtures of experts cannot do; and it sends every
    token to all experts' ranks, which takes micro-batches of one shape.
    """
    ours = {
        "lr_decay_style": "constant",
        "make_vocab_size_divisible_by": 1,
        "sequence_parallel": layout.tensor > 1,
        "moe_token_dispatcher_type": "alltoall",
    }
    return {key: value for key, value in ours.items() if key not in megatron}


def _owned(layout: Layout, seed: int, on_gpu: bool) -> dict[str, Any]:
    """What the trainer decides; the reasons stand in `settings.OWNED`."""
    off = (
        "bias_dropout_fusion bias_gelu_fusion masked_softmax_fusion gradient_accumulation_fusion "
        "perform_initialization check_for_nan_in_loss_and_grad"
    )
    return {
        **dict.fromkeys(off.split(), False),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,
        "no_persist_layer_norm": True,
        "micro_batch_size": 1,
        "seed": seed,
        "use_cpu_initialization": not on_gpu,
        "use_distributed_optimizer": True,
        "distributed_backend": "nccl" if on_gpu else "gloo",
        # Where all ranks' optimizer state can be loaded by another number of ranks (see resume_fixes).
        "dist_ckpt_optim_fully_reshardable": True,
    }


if __name__ == "__main__":  # rewrites the record that settings.py reads
    file = Path(__file__).with_name(f"arguments-{TESTED_VERSION}.json")
    lines = ",\n".join(json.dumps(entry) for entry in describe_parser())
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
