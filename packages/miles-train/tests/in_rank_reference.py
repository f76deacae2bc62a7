"""Our model beside transformers', in a rank's process."""

import numpy as np
import torch
from in_rank_trainer import make_trainer
from train_tiny import batch_of
from transformers import AutoConfig, AutoModelForCausalLM

from miles_train.export import export_directory
from miles_train.megatron import MegatronTrainer, cpu_shim
from miles_train.megatron.runtime import Address
from miles_train.megatron.trainer import Hooks
from miles_train.megatron.weights.convert import hf_weights
from miles_train.model_dir import open_model_directory


class NegativeLogLikelihood:
    """-log p, which transformers computes as well."""

    needs_entropy = False

    def __call__(self, inputs):
        return -inputs.logprobs, {}


def make_reference_model(_, path, model_type, values):
    """A random model of transformers, its norms and biases too, saved to `path`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)


def compare_with_transformers(address, path):
    """Logits and gradients of both, as {"logits": (ours, theirs), "gradients": {name: (ours, theirs)}}."""
    models = []
    trainer = MegatronTrainer(
        path,
        {"lr": 1e-9, "clip_grad": 0.0, "weight_decay": 0.0},
        NegativeLogLikelihood(),
        address=Address(address[0], address[1], address[2], next(address[3])),
        hooks=Hooks(after_model_init=models.extend),
    )
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    batch = batch_of(num_samples=6)
    ends = batch.offsets[1:-1]
    samples = [torch.from_numpy(part).long() for part in np.split(batch.tokens, ends)]
    masks = [torch.from_numpy(part) for part in np.split(batch.loss_mask, ends)]
    logits = ours_logits(models[0], samples[0]), reference(samples[0][None]).logits[0].detach().numpy()

    loss = sum(
        -reference(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0][mask[1:]].sum()
        for tokens, mask in zip(samples, masks, strict=True)
    )
    (loss / batch.num_loss_tokens).backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    trainer.step([batch])
    grads = {name: parameter.main_grad for name, parameter in models[0].module.named_parameters()}
    ours = dict(hf_weights(grads, trainer._table, {}))
    trainer.close()
    return {
        "logits": logits,
        "gradients": {name: (ours[name].numpy(), theirs[name]) for name in theirs},
    }


def ours_logits(model, tokens):
    with cpu_shim.active(), torch.no_grad():
        return model(tokens[None], torch.zeros_like(tokens)[None], None)[0].numpy()


def export_and_compare(address, path, folder):
    """Logprobs of a trained model, ours and those of its export in transformers."""
    trainer = make_trainer(address, path)
    trainer.step([batch_of()])
    export_directory(folder / "sharded", open_model_directory(path), trainer.weights, max_shard_bytes=20_000)
    batch = batch_of().take([0])
    ours = trainer.logprobs(batch)[1:]
    trainer.close()
    tokens = torch.from_numpy(batch.tokens).long()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "sharded").eval()(tokens[None]).logits[0]
    return ours, logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0].numpy()
