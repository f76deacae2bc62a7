"""Random DeepSeek-V4 models, in a rank's process: their tables of hashed experts need distinct experts."""

import re

import torch
from in_rank_reference import changed_tensors, ours_logits
from in_rank_trainer import make_trainer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from miles_train.megatron.trainer import Hooks


def make_model(_, path, values):
    """A model of transformers whose choices do not hang on rounding, saved to `path`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v4", **values)
    model = AutoModelForCausalLM.from_config(config)
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((1.0 if name.endswith("gate.weight") else 0.1) * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(experts)[:top_k] for _ in range(config.vocab_size)]))
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(path)


def respell(_, path, patterns):
    """Rename the stored tensors: each (pattern, replacement) in turn."""
    tensors = load_file(path / "model.safetensors")
    for pattern, replacement in patterns:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return sorted(tensors)


def compare_logits(address, path):
    """Logits of a random sequence, ours and those of transformers; and the tensors that do not come back as stored."""
    models = []
    trainer = make_trainer(address, path, hooks=Hooks(after_model_init=models.extend))
    tokens = torch.randint(0, 16, (40,), generator=torch.Generator().manual_seed(0))
    ours, changed = ours_logits(models[0], tokens), changed_tensors(trainer, path)
    trainer.close()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path)(tokens[None]).logits[0].numpy()
    return (ours, theirs), changed
