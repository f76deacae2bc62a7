"""Our model beside transformers', in a rank's process."""

import contextlib
import tempfile

import numpy as np
import torch
from in_rank_trainer import make_trainer
from safetensors.torch import load_file
from train_tiny import batch_of
from transformers import AutoConfig, AutoModelForCausalLM

from miles_train.megatron import MegatronTrainer, cpu_shim
from miles_train.megatron.runtime import Address
from miles_train.megatron.trainer import Hooks
from miles_train.megatron.weights.convert import hf_weights, model_tensors
from miles_train.model_dir import open_model_directory

# A router whose choices hang on rounding would make a test a game of chance.
SPREAD = {"gate.weight": 1.0, "router.weight": 1.0}


class NegativeLogLikelihood:
    """-log p, which transformers computes as well."""

    needs_entropy = False

    def __call__(self, inputs):
        return -inputs.logprobs, {}


def make_reference_model(_, path, model_type, values, dtype="float32"):
    """A random model of transformers, its norms, biases and routers' corrections too, saved to `path`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = next((spread for end, spread in SPREAD.items() if name.endswith(end)), 0.1)
            parameter.add_(spread * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(path)


def compare_with_transformers(address, path, settings=None, reference_path=None, prefix=""):
    """Logits, gradients and stored tensors of both.

    Args:
        address: of the rank.
        path: our model's directory.
        settings: of the trainer.
        reference_path: transformers' directory, if it is another one.
        prefix: what stands before its names in ours.

    Returns:
        {"logits": [(ours, theirs) of each sample], "gradients": {stored name: (ours, theirs)}, "exported": names of
        stored tensors that do not come back bit for bit, and of tensors that come back but were not stored}.
    """
    torch.set_num_threads(1)
    models = []
    trainer = MegatronTrainer(
        path,
        {"lr": 1e-9, "clip_grad": 0.0, "weight_decay": 0.0, **(settings or {})},
        NegativeLogLikelihood(),
        address=Address(address[0], address[1], address[2], next(address[3])),
        hooks=Hooks(after_model_init=models.extend),
    )
    with contextlib.closing(trainer):
        return _compare(trainer, models[0], path, reference_path or path, prefix)


def _compare(trainer, model, path, reference_path, prefix):
    reference = AutoModelForCausalLM.from_pretrained(
        # Transformers' other experts refuse sizes that are no multiples of 16 bytes.
        reference_path,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    batch = batch_of(num_samples=6)
    ends = batch.offsets[1:-1]
    samples = [torch.from_numpy(part).long() for part in np.split(batch.tokens, ends)]
    masks = [torch.from_numpy(part) for part in np.split(batch.loss_mask, ends)]
    ours_all = [ours_logits(model, tokens) for tokens in samples]
    theirs_all = [reference(tokens[None]).logits[0] for tokens in samples]
    losses = [
        -logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0][mask[1:]].sum()
        for logits, tokens, mask in zip(theirs_all, samples, masks, strict=True)
    ]
    (sum(losses) / batch.num_loss_tokens).backward()
    theirs = {prefix + name: gradient for name, gradient in stored_gradients(reference).items()}
    changed = changed_tensors(trainer, path)
    trainer.step([batch])
    tensors = model_tensors(model.module)
    gradients = {name: gradient_of(tensor) for name, tensor in tensors.items()}
    ours = dict(hf_weights(gradients, trainer._table, {}))
    ours |= {name: torch.zeros_like(theirs[name]) for name in theirs if trainer._table.is_outside(name)}
    return {
        # Ours may be padded.
        "logits": [(a[:, : b.shape[1]], b.detach().numpy()) for a, b in zip(ours_all, theirs_all, strict=True)],
        "gradients": {name: (ours[name].numpy(), theirs[name].numpy()) for name in theirs},
        "exported": changed,
    }


def gradient_of(tensor):
    """Megatron's gradient of a parameter; zeros for what takes none; a buffer itself."""
    if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
        return torch.zeros_like(tensor)
    return getattr(tensor, "main_grad", tensor)


def stored_gradients(reference):
    """Gradients under the names that parameters have in a checkpoint: transformers stacks experts in memory alone."""
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in reference.named_parameters()
    }
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder, state_dict=grads)
        return load_file(f"{folder}/model.safetensors")


def changed_tensors(trainer, path):
    """Tensors that do not come back as they were stored."""
    with open_model_directory(path).reader() as read:
        names = [name for name in open_model_directory(path).tensors if not trainer._table.is_outside(name)]
        stored = {name: read(name).clone() for name in names}
    ours = {name: tensor.clone() for name, tensor in trainer.weights()}
    both = ours.keys() & stored.keys()
    return sorted(ours.keys() ^ stored.keys()) + sorted(
        name for name in both if not torch.equal(ours[name].to(stored[name].dtype), stored[name])
    )


def ours_logits(model, tokens):
    with cpu_shim.active(), torch.no_grad():
        return model(tokens[None], torch.zeros_like(tokens)[None], None)[0].numpy()


def export_and_compare(address, path, folder):
    """Logprobs of a trained model, ours and those of its export in transformers."""
    trainer = make_trainer(address, path)
    trainer.step([batch_of()])
    trainer.export(folder / "sharded", max_shard_bytes=20_000)
    batch = batch_of().take([0])
    ours = trainer.logprobs(batch)[1:]
    trainer.close()
    tokens = torch.from_numpy(batch.tokens).long()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder / "sharded").eval()(tokens[None]).logits[0]
    return ours, logits.log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0].numpy()
