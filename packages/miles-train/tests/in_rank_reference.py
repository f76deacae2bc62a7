"""Our model beside transformers', in a rank's process."""

import contextlib
import itertools
import tempfile

import torch
from in_rank_trainer import make_trainer
from safetensors.torch import load_file
from train_tiny import batch_of
from transformers import AutoConfig, AutoModelForCausalLM

from miles_train.comparison import negative_log_likelihood
from miles_train.megatron import MegatronTrainer, cpu_shim
from miles_train.megatron.runtime import Address
from miles_train.model_dir import open_model_directory
from miles_train.reference import load_reference, reference_logits, write_gradients

# A router whose choices hang on rounding would make a test a game of chance.
SPREAD = {"gate.weight": 1.0, "router.weight": 1.0}


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
    trainer = MegatronTrainer(
        path,
        {"lr": 1e-9, "clip_grad": 0.0, "weight_decay": 0.0, **(settings or {})},
        negative_log_likelihood,
        address=Address(address[0], address[1], address[2], next(address[3])),
    )
    with contextlib.closing(trainer):
        return _compare(trainer, path, reference_path or path, prefix)


def _compare(trainer, path, reference_path, prefix):
    reference, _ = load_reference(open_model_directory(reference_path))
    batch = batch_of(num_samples=6)
    theirs_all = reference_logits(reference, batch)
    theirs = {prefix + name: gradient for name, gradient in stored_gradients(reference).items()}
    changed = changed_tensors(trainer, path)
    ours_all = trainer.logits(batch)
    ours = {name: gradient.clone() for name, gradient in trainer.gradients(batch)}
    ours |= {name: torch.zeros_like(theirs[name]) for name in theirs if trainer._table.is_outside(name)}
    samples = [slice(start + 1, stop) for start, stop in itertools.pairwise(batch.offsets)]
    return {
        "logits": [(ours_all[rows], theirs_all[rows]) for rows in samples],
        "gradients": {name: (ours[name].numpy(), theirs[name].numpy()) for name in theirs},
        "exported": changed,
    }


def stored_gradients(reference):
    """Gradients under the names that parameters have in a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_gradients(reference, folder)
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
