"""Multi-token prediction beside a written-out reference, in a rank's process.

DeepSeek-V3 (arXiv:2412.19437, section 2.2): the k-th layer takes, at position i, a projection of the normalised
embedding of token i + k beside the normalised hidden state of the layer before it, and predicts token i + k + 1.
"""

import json

import numpy as np
import torch
from in_rank_reference import (
    changed_tensors,
    make_reference_model,
    stored_gradients,
)
from in_rank_trainer import make_trainer
from safetensors.torch import load_file, save_file
from train_tiny import batch_of
from transformers import AutoConfig, AutoModelForCausalLM

from miles_train.comparison import negative_log_likelihood
from miles_train.megatron.gradients import gradient_of
from miles_train.megatron.trainer import Hooks
from miles_train.megatron.weights.convert import hf_weights
from miles_train.megatron.weights.names import global_tensors

FACTOR = 0.3


def make_model(_, path, model_type, values, num_more):
    """A model whose last layers become those for multi-token prediction."""
    layers = values["num_hidden_layers"]
    make_reference_model(None, path, model_type, {**values, "num_hidden_layers": layers + num_more})
    tensors, hidden = load_file(path / "model.safetensors"), values["hidden_size"]
    for layer in range(layers, layers + num_more):
        name = f"model.layers.{layer}."
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{name}{norm}.weight"] = 1 + 0.1 * torch.randn(hidden)
        tensors[name + "eh_proj.weight"] = 0.2 * torch.randn(hidden, 2 * hidden)
        tensors[name + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        head = "model.embed_tokens.weight" if values.get("tie_word_embeddings") else "lm_head.weight"
        tensors[name + "shared_head.head.weight"] = tensors[head].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": num_more}
    (path / "config.json").write_text(json.dumps(config))


def compare(address, path, settings=None):
    """Logprobs and gradients as {name: (ours, theirs)}, and tensors that do not come back."""
    chunks = []
    # Rates at which a step changes nothing.
    settings = {
        "mtp_loss_scaling_factor": FACTOR,
        "lr": 1e-9,
        "clip_grad": 0.0,
        "weight_decay": 0.0,
        **(settings or {}),
    }
    hooks = Hooks(after_model_init=chunks.extend)
    trainer = make_trainer(address, path, settings, negative_log_likelihood, hooks=hooks, micro_batch_tokens=30)
    batch = batch_of()
    ours_logprobs = trainer.logprobs(batch)
    changed = changed_tensors(trainer, path)
    trainer.step([batch])
    tensors = global_tensors([chunk.module for chunk in chunks])
    ours = dict(hf_weights({name: gradient_of(tensor) for name, tensor in tensors.items()}, trainer._table, {}))
    trainer.close()
    logprobs, theirs = written_out(path, batch)
    return (ours_logprobs, logprobs), {name: (ours[name].numpy(), theirs[name].numpy()) for name in theirs}, changed


def written_out(path, batch):
    config = AutoConfig.from_pretrained(path)
    layers, num_more = config.num_hidden_layers, config.num_nextn_predict_layers
    config.num_hidden_layers = layers + num_more
    if getattr(config, "mlp_layer_types", None):
        config.mlp_layer_types = [*config.mlp_layer_types, *["sparse"] * num_more]
    model = AutoModelForCausalLM.from_pretrained(path, config=config, attn_implementation="eager", dtype=torch.float32)
    stored = load_file(path / "model.safetensors")
    own = {name: tensor.requires_grad_() for name, tensor in stored.items() if is_own(name)}

    def norm(hidden, weight):
        return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, config.rms_norm_eps)

    def run(layer, hidden, length):
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        positions = torch.arange(length)[None]
        angles = model.model.rotary_emb(hidden, position_ids=positions)
        return layer(hidden, attention_mask=mask, position_embeddings=angles, position_ids=positions)

    loss, column = 0.0, []
    for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
        tokens, trained = (
            torch.from_numpy(batch.tokens[start:stop]).long(),
            torch.from_numpy(batch.loss_mask[start:stop]),
        )
        hidden = model.model.embed_tokens(tokens)[None]
        for layer in model.model.layers[:layers]:
            hidden = run(layer, hidden, len(tokens))
        hidden = model.model.norm(hidden)
        logprobs = model.lm_head(hidden)[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
        column.append(np.append(np.float32(0), logprobs.detach().numpy()))
        loss = loss - logprobs[trained[1:]].sum()
        for ahead in range(1, min(num_more, len(tokens) - 2) + 1):
            name = f"model.layers.{layers + ahead - 1}."
            embedded = norm(model.model.embed_tokens(tokens[ahead:])[None], own[name + "enorm.weight"])
            before = norm(hidden[:, : len(tokens) - ahead], own[name + "hnorm.weight"])
            hidden = torch.cat([embedded, before], dim=-1) @ own[name + "eh_proj.weight"].T
            hidden = run(model.model.layers[layers + ahead - 1], hidden, len(tokens) - ahead)
            hidden = norm(hidden, own[name + "shared_head.norm.weight"])
            further = model.lm_head(hidden)[0].log_softmax(-1)[:-1].gather(-1, tokens[1 + ahead :, None])[:, 0]
            loss = loss - FACTOR / num_more * further[trained[1 + ahead :]].sum()
    (loss / batch.num_loss_tokens).backward()
    return np.concatenate(column), {**stored_gradients(model), **{name: tensor.grad for name, tensor in own.items()}}


def is_own(name):
    return name.endswith(("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"))
