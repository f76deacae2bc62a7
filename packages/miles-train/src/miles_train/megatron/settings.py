"""Checks `[train.megatron]` before any process starts, without importing Megatron.

The keys are Megatron's own argument names. What its parser knows lies in `arguments-<version>.json`, written by
`miles_train.megatron.arguments.describe_parser`; a test holds the file against the installed parser. The rank itself
parses the same mapping with Megatron's parser and rules again (`miles_train.megatron.arguments`).

Every known argument is one of four: derived from the model directory, decided by the trainer, read by the trainer, or
never read by it. Only the third kind may be set.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from miles_core.errors import InputError

TESTED_VERSION = "0.19.2"
SECTION = "train.megatron"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


DERIVED = _names(
    """
    num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels
    group_query_attention num_query_groups max_position_embeddings seq_length encoder_seq_length decoder_seq_length
    vocab_size padded_vocab_size pad_vocab_size layernorm_epsilon normalization swiglu add_bias_linear add_qkv_bias
    qk_layernorm position_embedding_type use_rotary_position_embeddings add_position_embedding rotary_base
    rotary_percent rotary_interleaved use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor
    rope_type untie_embeddings_and_output_weights rotary_scaling_factor mscale mscale_all_dim
    num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_num_groups moe_router_group_topk
    moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
    moe_router_enable_expert_bias moe_shared_expert_intermediate_size moe_shared_expert_gate moe_latent_size
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    mtp_num_layers mtp_use_repeated_layer
    attention_output_gate layernorm_zero_centered_gamma qk_l2_norm softmax_type window_size window_attn_skip_freq
    experimental_attention_variant linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads
    dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
    dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
    dsa_indexer_k_norm_fp32
    """
)

_NO_BALANCING = "the recipe's loss is the only one: a loss that balances experts would pull the policy elsewhere"

_FUSIONS = "fusions follow from transformer_impl: with Transformer Engine those are on that change no result"

OWNED: Mapping[str, str] = {
    "apply_rope_fusion": _FUSIONS,
    "attention_dropout": "dropout is off: the trainer's logprobs must be those of the engine",
    "bias_dropout_fusion": _FUSIONS,
    "bias_gelu_fusion": _FUSIONS,
    "bias_swiglu_fusion": _FUSIONS,
    "calculate_per_token_loss": "the batch's loss_weights already say what each token counts",
    "check_for_nan_in_loss_and_grad": "a non-finite loss or gradient always stops the step",
    "deterministic_mode": "it is the trainer's own parameter `deterministic`",
    "distributed_backend": "it follows from the device",
    "global_batch_size": "a step trains on the batch it is given",
    "gradient_accumulation_fusion": _FUSIONS,
    "hidden_dropout": "dropout is off: the trainer's logprobs must be those of the engine",
    "masked_softmax_fusion": _FUSIONS,
    "moe_aux_loss_coeff": _NO_BALANCING,
    "moe_permute_fusion": _FUSIONS,
    "moe_router_load_balancing_type": _NO_BALANCING,
    "moe_router_bias_update_rate": "the bias of the router is a weight of the model directory that no step changes",
    "moe_z_loss_coeff": _NO_BALANCING,
    "micro_batch_size": "micro-batches are cut by tokens: set the trainer's `micro_batch_tokens`",
    "no_persist_layer_norm": "the trainer brings its own RMSNorm",
    "optimizer": "AdamW is the only one whose state is checkpointed here",
    "overlap_p2p_comm": "it follows from the pipeline: virtual stages need it, others forbid it",
    "perform_initialization": "all weights come from the model directory",
    "seed": "it is the trainer's own parameter `seed`",
    "use_cpu_initialization": "it follows from the device",
    "use_distributed_optimizer": "it is always on: any layout of ranks can read its state from a checkpoint",
}

READ = _names(
    """
    lr min_lr lr_decay_style lr_decay_iters lr_warmup_iters lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters
    weight_decay start_weight_decay end_weight_decay weight_decay_incr_style apply_wd_to_qk_layernorm decoupled_lr
    decoupled_min_lr adam_beta1 adam_beta2 adam_eps clip_grad bf16 accumulate_allreduce_grads_in_fp32
    grad_reduce_in_bf16 fp32_residual_connection recompute_granularity recompute_method recompute_num_layers
    recompute_modules recompute_activations distributed_timeout_minutes make_vocab_size_divisible_by
    tensor_model_parallel_size sequence_parallel pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage
    num_virtual_stages_per_pipeline_rank decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    pipeline_model_parallel_layout context_parallel_size expert_model_parallel_size expert_tensor_parallel_size
    moe_token_dispatcher_type moe_grouped_gemm transformer_impl mtp_loss_scaling_factor mtp_detach_heads
    """
)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of Megatron's parser.

    Attributes:
        dest: its name, and the key in `[train.megatron]`.
        flags: its command-line spellings, with underscores and without dashes; keys too, where one differs from `dest`.
        kind: "true" or "false" for a flag that stores this when given, "bool" for --x and --no-x, "value" otherwise.
        type: "int", "float", "str", or "any" where Megatron converts by a function of its own.
        many: whether it takes a list.
        choices: allowed values as text, or None.
    """

    dest: str
    flags: tuple[str, ...]
    kind: str
    type: str
    many: bool
    choices: tuple[str, ...] | None


@cache
def known_arguments() -> Mapping[str, Argument]:
    """Megatron's arguments by dest and by flag, as recorded for `TESTED_VERSION`."""
    file = resources.files(__package__).joinpath(f"arguments-{TESTED_VERSION}.json")
    by_name: dict[str, Argument] = {}
    for entry in json.loads(file.read_text(encoding="utf-8")):
        choices = entry["choices"]
        argument = Argument(
            entry["dest"],
            tuple(entry["flags"]),
            entry["kind"],
            entry["type"],
            entry["many"],
            None if choices is None else tuple(choices),
        )
        for name in (argument.dest, *argument.flags):
            by_name.setdefault(name, argument)
    return by_name


def check_settings(megatron: Mapping[str, Any]) -> None:
    """Check the keys and values of `[train.megatron]`; `layout.check_layout` holds them against ranks and model.

    Raises:
        InputError: an unknown key (naming the nearest), one that is derived, decided by the trainer or never read, one
            set twice under two spellings, a value of the wrong type, or a key that another setting switches off.
    """
    seen: dict[str, str] = {}
    for key, value in megatron.items():
        argument = _find(key)
        if argument.dest in seen:
            raise InputError(
                f"{SECTION}.{key}",
                value,
                f"sets the same argument as {seen[argument.dest]}",
                "Keep one of the two.",
            )
        seen[argument.dest] = key
        _check_settable(key, value, argument)
        _check_type(key, value, argument)
    _check_together({_find(key).dest: value for key, value in megatron.items()})


def _find(key: str) -> Argument:
    known = known_arguments()
    if key in known:
        return known[key]
    settable = [name for name, argument in known.items() if argument.dest in READ]
    near = difflib.get_close_matches(key, settable, n=1, cutoff=0.6) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.0
    )
    raise InputError(
        f"{SECTION}.{key}",
        "...",
        f"Megatron-Core {TESTED_VERSION} has no such argument",
        f"Did you mean {near[0]}?",
    )


def _check_settable(key: str, value: Any, argument: Argument) -> None:
    dest = argument.dest
    if dest in DERIVED:
        rule, way_out = "it is derived from config.json of the model directory", "Remove the key."
    elif dest in OWNED:
        rule, way_out = OWNED[dest], "Remove the key."
    elif dest not in READ:
        rule, way_out = "nothing reads it in this trainer, so it would have no effect", "Remove the key."
    elif dest == "transformer_impl" and value == "inference_optimized":
        rule, way_out = "it has no backward pass", 'Remove the key, or set "local".'
    elif dest == "moe_token_dispatcher_type" and value == "allgather":
        rule, way_out = "needs micro-batches of one shape on all ranks, which these are not", 'Set "alltoall".'
    else:
        return
    raise InputError(f"{SECTION}.{key}", value, rule, way_out)


def _check_type(key: str, value: Any, argument: Argument) -> None:
    if argument.kind != "value":
        wanted, right = "true or false", isinstance(value, bool)
    elif argument.many:
        wanted, right = "a list", isinstance(value, list)
    elif argument.type == "int":
        wanted, right = "an integer", isinstance(value, int) and not isinstance(value, bool)
    elif argument.type == "float":
        wanted, right = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        wanted, right = "text or a number", isinstance(value, str | int | float)
    if right and argument.choices is not None:
        values: list[Any] = value if isinstance(value, list) else [value]
        wanted, right = f"one of {', '.join(argument.choices)}", {str(v) for v in values} <= set(argument.choices)
    if not right:
        raise InputError(f"{SECTION}.{key}", value, f"must be {wanted}", "Correct the value.")


def _check_together(values: Mapping[str, Any]) -> None:
    """Rules over several keys: what must be there, and what another key leaves without effect."""
    if "lr" not in values:
        raise InputError(f"{SECTION}.lr", None, "must be set: Megatron has no default", "Add for example lr = 1e-6.")
    style = values.get("lr_decay_style", "constant")
    if style == "constant":
        for key in ("min_lr", "lr_decay_iters", "lr_wsd_decay_style", "lr_wsd_decay_iters"):
            _inert(values, key, f"lr_decay_style = {style!r} never decays", 'Set lr_decay_style = "linear".')
    elif "lr_decay_iters" not in values:
        raise InputError(
            f"{SECTION}.lr_decay_style",
            style,
            "needs lr_decay_iters, the optimizer updates until min_lr is reached",
            "Add lr_decay_iters.",
        )
    if style != "WSD":
        for key in ("lr_wsd_decay_style", "lr_wsd_decay_iters"):
            _inert(values, key, f"lr_decay_style = {style!r} does not read it", 'Set lr_decay_style = "WSD".')
    if values.get("weight_decay_incr_style", "constant") == "constant":
        for key in ("start_weight_decay", "end_weight_decay"):
            _inert(values, key, "a constant weight decay does not read it", "Set weight_decay_incr_style.")
    if not values.get("lr_warmup_iters"):
        _inert(values, "lr_warmup_init", "there is no warm-up", "Set lr_warmup_iters.")
    if not values.get("recompute_granularity") and not values.get("recompute_activations"):
        for key in ("recompute_method", "recompute_num_layers", "recompute_modules"):
            _inert(values, key, "nothing is recomputed", "Set recompute_granularity.")
    if values.get("transformer_impl") == "transformer_engine" and not values.get("bf16"):
        raise InputError(
            f"{SECTION}.transformer_impl",
            "transformer_engine",
            "needs bf16 = true: its attention kernels do not compute in float32",
            "Set bf16 = true, or remove the key.",
        )
    if not values.get("bf16"):
        for key in ("accumulate_allreduce_grads_in_fp32", "grad_reduce_in_bf16", "fp32_residual_connection"):
            _inert(values, key, "the model is in float32", "Set bf16 = true.")
    if values.get("sequence_parallel") and values.get("tensor_model_parallel_size", 1) == 1:
        _inert(values, "sequence_parallel", "tensor_model_parallel_size = 1", "Set tensor_model_parallel_size.")
    if "num_virtual_stages_per_pipeline_rank" in values:
        key = "num_layers_per_virtual_pipeline_stage"
        _inert(values, key, "num_virtual_stages_per_pipeline_rank says the same", "Set one of the two.")
    if "mtp_loss_scaling_factor" not in values:
        rule = "layers for multi-token prediction are trained only with mtp_loss_scaling_factor"
        _inert(values, "mtp_detach_heads", rule, "Set mtp_loss_scaling_factor.")
    if "decoupled_lr" not in values:
        _inert(values, "decoupled_min_lr", "there is no decoupled_lr", "Set decoupled_lr.")


def _inert(values: Mapping[str, Any], key: str, why: str, way_out: str) -> None:
    if key in values:
        raise InputError(f"{SECTION}.{key}", values[key], f"has no effect: {why}", f"Remove the key. {way_out}")
