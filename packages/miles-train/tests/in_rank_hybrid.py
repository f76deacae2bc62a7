"""What Qwen's hybrid families need beside `in_rank_reference`, in the ranks' processes."""

import numpy as np
import torch
from in_rank_reference import ours_logits
from in_rank_trainer import make_trainer
from safetensors.torch import load_file, save_file
from train_tiny import batch_of
from transformers import AutoConfig, AutoModelForImageTextToText

from miles_train.megatron import cpu_shim
from miles_train.megatron.upstream import PackedSeqParams

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
SETTINGS = {"lr": 1e-9, "clip_grad": 0.0, "weight_decay": 0.0}


def make_with_vision(_, path, model_type, text, like_the_hub):
    """A random model with a vision tower, as transformers saves it, or with experts stacked and an MTP layer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
    vision = {**VISION, "out_hidden_size": text["hidden_size"]}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **tied)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    if like_the_hub:
        tensors = load_file(path / "model.safetensors")
        _stack_experts(tensors, text.get("num_experts", 0), text["num_hidden_layers"])
        tensors |= {"mtp.fc.weight": torch.randn(4, 8), "mtp.layers.0.mlp.gate.weight": torch.randn(3, 4)}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _stack_experts(tensors, num_experts, num_layers):
    for layer in range(num_layers if num_experts else 0):
        prefix = f"model.language_model.layers.{layer}.mlp.experts."
        parts = {
            part: torch.stack([tensors.pop(f"{prefix}{expert}.{part}_proj.weight") for expert in range(num_experts)])
            for part in ("gate", "up", "down")
        }
        tensors[prefix + "gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[prefix + "down_proj"] = parts["down"]


def logits_of_the_whole(address, path, exported):
    """Logits of a text, ours and those of transformers' model with its vision tower; and export at once."""
    trainer = make_trainer(address, path, SETTINGS)
    tokens = torch.from_numpy(batch_of().take([0]).tokens).long()
    ours = ours_logits(trainer._cores[0], tokens)
    trainer.export(exported)
    trainer.close()
    with torch.no_grad():
        theirs = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager")(tokens[None]).logits
    return ours, theirs[0].numpy()


def packed_and_apart(address, path):
    """Logits of samples packed end to end, and of each alone."""
    trainer = make_trainer(address, path, SETTINGS)
    batch = batch_of(num_samples=4)
    samples = [torch.from_numpy(part).long() for part in np.split(batch.tokens, batch.offsets[1:-1])]
    ends = torch.from_numpy(batch.offsets).to(torch.int32)
    longest = int(batch.lengths.max())
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    tokens = torch.cat(samples)[None]
    with cpu_shim.active(), torch.no_grad():
        packed = trainer._cores[0](tokens, torch.zeros_like(tokens), None, packed_seq_params=packing)[0].numpy()
    apart = np.concatenate([ours_logits(trainer._cores[0], sample) for sample in samples])
    trainer.close()
    return packed, apart


def train_in_bfloat16(address, path):
    """Tensors that stay in float32, as they were and after a step; and logprobs of the other precision beside ours."""
    trainer = make_trainer(address, path, {**SETTINGS, "lr": 1e-4, "bf16": True})
    before = {name: tensor.clone() for name, tensor in trainer.weights() if tensor.dtype == torch.float32}
    logprobs = trainer.logprobs(batch_of())
    trainer.step([batch_of()])
    after = {name: tensor.clone() for name, tensor in trainer.weights() if tensor.dtype == torch.float32}
    trainer.close()
    trainer = make_trainer(address, path, SETTINGS)
    wide = trainer.logprobs(batch_of())
    trainer.close()
    return before, after, logprobs, wide
