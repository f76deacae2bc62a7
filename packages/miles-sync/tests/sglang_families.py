"""Run by test_sync_families.py in a process of its own: stock SGLang models on a CPU, tiny, every rank simulated.

Prints one line of JSON per family and rank. `python sglang_families.py FAMILY...`; its environment is the caller's.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.dp_attention import initialize_dp_attention
from sglang.srt.model_loader.utils import get_model_architecture, set_default_torch_dtype
from sglang.srt.runtime_context import get_context, get_parallel
from sglang.srt.server_args import ServerArgs

from miles_sync.manifest import DTYPES, Manifest, describe, lay_out
from miles_sync.plan import CopyPlan, bind, decode, unread
from miles_sync.receivers import Piece, Pieces
from miles_sync.rehearsal import record

BASE = {
    "vocab_size": 131,  # is padded to 192
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "rope_theta": 10000.0,
    },
}
HYBRID = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_key_heads_cpu": 2,  # SGLang's own, set where it starts an engine
    "linear_num_value_heads_cpu": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 32,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architecture": "Qwen3ForCausalLM"},
    "qwen3_one_kv_head": {"model_type": "qwen3", "architecture": "Qwen3ForCausalLM", "num_key_value_heads": 1},
    "llama": {"model_type": "llama", "architecture": "LlamaForCausalLM"},
    "qwen3_moe": {"model_type": "qwen3_moe", "architecture": "Qwen3MoeForCausalLM", **QWEN_MOE},
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        "architecture": "DeepseekV2ForCausalLM",
        **DEEPSEEK,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "architecture": "DeepseekV3ForCausalLM",
        **DEEPSEEK,
        "q_lora_rank": 24,
        "n_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 0,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        "architecture": "Glm4MoeForCausalLM",
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
    },
    "qwen3_next": {"model_type": "qwen3_next", "architecture": "Qwen3NextForCausalLM", **QWEN_MOE, **HYBRID},
    "qwen3_5": {"model_type": "qwen3_5_text", "architecture": "Qwen3_5ForCausalLM", **HYBRID},
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe_text",
        "architecture": "Qwen3_5MoeForCausalLM",
        **QWEN_MOE,
        **HYBRID,
    },
}


def write_config(family: str) -> str:
    """Write a family's config.json; returns its folder."""
    settings = BASE | FAMILIES[family]
    settings["architectures"] = [settings.pop("architecture")]
    folder = tempfile.mkdtemp()
    Path(folder, "config.json").write_text(json.dumps(settings))
    return folder


def build(folder: str) -> torch.nn.Module:
    """Construct SGLang's model for a config folder, in bfloat16, as the rank that is simulated now."""
    arguments = ServerArgs(
        model_path=folder,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        mem_fraction_static=0.1,
        skip_tokenizer_init=True,
        dtype="bfloat16",
    )
    get_context().set_server_args(arguments)
    config = ModelConfig.from_server_args(arguments)
    initialize_dp_attention(arguments, config)
    name = config.hf_config.architectures[0]
    if name.startswith("Qwen3_5"):  # the registry has it under a name of its own
        from sglang.srt.models import qwen3_5_text  # noqa: PLC0415

        kind = getattr(qwen3_5_text, name)
    else:
        kind, _ = get_model_architecture(config)
    with set_default_torch_dtype(torch.bfloat16):
        return kind(config=config.hf_config, quant_config=None)


def checkpoint(folder: str, seed: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of a Hugging Face checkpoint: transformers' own, experts one by one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    kept = model.state_dict().keys() & dict(model.named_buffers()).keys()
    for name, meta in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in kept)]:
        tensor = torch.randn(meta.shape, generator=generator).to(meta.dtype)
        prefix, _, last = name.rpartition(".")
        if last == "e_score_correction_bias":
            weights[name] = tensor.float()
        elif last == "gate_up_proj" and prefix.endswith("experts"):
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                weights |= {f"{prefix}.{expert}.gate_proj.weight": gate, f"{prefix}.{expert}.up_proj.weight": up}
        elif last == "down_proj" and prefix.endswith("experts"):
            weights |= {f"{prefix}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            weights[name] = tensor
    return weights


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of parameters, buffers, and what a model keeps beside them (MLA's absorbed projections)."""
    kept = {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    for name, module in model.named_modules():
        for key in ("w_kc", "w_vc"):
            value = getattr(module, key, None)
            if isinstance(value, torch.Tensor):
                kept[f"{name}.{key}"] = value.clone()
    return kept


def loaded(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model's own loader makes of weights."""
    model.load_weights([(name, tensor.clone()) for name, tensor in weights.items()])  # type: ignore[operator]
    return everything(model)


def pieces_of(manifest: Manifest, weights: dict[str, torch.Tensor], nbytes: int) -> list[Pieces]:
    """The flat buffer in buckets of `nbytes`, each as the pieces of tensors that it holds."""
    flat = torch.zeros(manifest.total_bytes, dtype=torch.uint8)
    for entry in manifest.entries:
        flat[entry.offset : entry.offset + entry.nbytes] = weights[entry.name].reshape(-1).view(torch.uint8)
    buckets = []
    for start in range(0, manifest.total_bytes, nbytes):
        bucket = []
        for index, entry in enumerate(manifest.entries):
            low, high = max(start, entry.offset), min(start + nbytes, entry.offset + entry.nbytes)
            if low < high:
                dtype = DTYPES[entry.dtype]
                bucket.append(Piece(index, (low - entry.offset) // dtype.itemsize, flat[low:high].view(dtype)))
        buckets.append(Pieces(bucket))
    return buckets


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names that differ."""
    return [name for name in one if not torch.equal(one[name], other[name])]


def examine(folder: str, *, sliced: bool) -> tuple[CopyPlan, Manifest, dict[str, Any]]:
    """Record a plan, replay it in one piece and in small buckets, twice each, and compare with the loader."""
    new, old = checkpoint(folder, 1), checkpoint(folder, 2)
    model = build(folder)
    manifest = lay_out([describe(name, tensor) for name, tensor in new.items()], 0)
    expected = loaded(model, new)
    before = loaded(model, old)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    plan = record(model, manifest, sliced=sliced)
    assert not equal(before, everything(model)), "recording changed the model"
    assert decode(plan.encode()) == plan
    assert record(model, manifest, sliced=sliced).digest() == plan.digest()
    copies = 0
    for nbytes in (manifest.total_bytes, 4096):
        loaded(model, old)
        buckets = pieces_of(manifest, new, nbytes)
        bound = bind(plan, manifest, model)
        for sync in ("first", "second"):
            bound.begin()
            for bucket in buckets:
                bound.install(bucket)
            bound.finish()
            different = equal(expected, everything(model))
            assert not different, f"{sync} sync in buckets of {nbytes}: {different}"
        copies = copies or sum(len(targets) for bucket in buckets for targets, _ in bucket.memo[1])
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    return (
        plan,
        manifest,
        {
            "tensors": len(manifest.entries),
            "copies": copies,
            "through_loader": sorted(plan.through_loader),
            "partial": len(plan.partial),
            "refreshes": plan.refreshes,
        },
    )


def main(families: list[str]) -> None:
    """Examine families, as the only rank and as both of two."""
    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile() as store:
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
        initialize_model_parallel(1)
        for family in families:
            folder = write_config(family)
            ranks = [
                {},
                *(
                    {f"{p}tp_{k}": v for p in ("", "attn_", "moe_") for k, v in (("size", 2), ("rank", r))}
                    for r in (0, 1)
                ),
            ]
            plans = []
            for rank in ranks:
                with get_parallel().override(**rank) if rank else contextlib.nullcontext():
                    plan, manifest, facts = examine(folder, sliced=bool(rank))
                if rank:
                    plans.append(plan)
                    facts["unread"] = unread(plans, manifest)
                print(json.dumps({"family": family, "rank": rank.get("tp_rank"), **facts}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(FAMILIES))
