"""The trainer in one layout of ranks, in the ranks' processes: what `layout_checks` holds against a single rank."""

from dataclasses import replace

import numpy as np
import torch
from in_rank_trainer import make_trainer
from train_tiny import batch_of

from miles_train.errors import NonFiniteError


class SequenceRatio:
    """A loss of whole samples (GSPO's ratio, Zheng et al. 2025, arXiv:2507.18071), and of the entropy."""

    needs = frozenset({"entropy"})

    def __call__(self, inputs):
        count = int(inputs.sample_index.max()) + 1
        d = torch.where(inputs.loss_mask, inputs.logprobs - inputs.old_logprobs.detach(), 0.0)
        sums = d.new_zeros(count).index_add(0, inputs.sample_index, d)
        sizes = d.new_zeros(count).index_add(0, inputs.sample_index, inputs.loss_mask.to(d.dtype))
        ratio = (sums / sizes.clamp(min=1)).exp()[inputs.sample_index]
        return -inputs.advantages * ratio - 0.1 * inputs.entropy, {"ratio": ratio.detach()}


# Updates of 0.1 times the gradient, all but linear in it: Adam's own would be of one size for every gradient.
LINEAR = {"lr": 1e3, "adam_eps": 1e4, "clip_grad": 0.0, "weight_decay": 0.0}


def run(address, path, settings, first_takes_all=False, packed=False):
    """Logprobs, then a step of two updates.

    Args:
        first_takes_all: leave all shards but the first empty.
        packed: samples end to end in one row.

    Returns:
        The shard that the rank brought and the logprobs of its samples; metrics; from rank 0 the weights after it.
    """
    # A micro-batch holds few samples: the shards need different numbers of them.
    more = {"micro_batch_tokens": 30, "packed": packed}
    trainer = make_trainer(address, path, {**LINEAR, **settings}, SequenceRatio(), **more)
    mine = range(trainer.shard, 12, trainer.num_shards)
    if first_takes_all:
        mine = range(12 if trainer.shard == 0 else 0)
    shards = [batch_of(seed).take(mine) for seed in (0, 1)]
    logprobs = trainer.logprobs(shards[0])
    metrics = trainer.step(shards)
    weights = {name: tensor.float().numpy().copy() for name, tensor in trainer.weights()}
    brought = trainer.shard, trainer.num_shards
    trainer.close()
    return brought, logprobs, metrics, weights if address[0] == 0 else {}


def stop(address, path, settings):
    """What a rank says of a step with a NaN in the first shard; whether its weights are those before it; and the
    gradient's norm of a step after it and of one without any before.
    """
    norms = []
    for broken in (True, False):
        trainer = make_trainer(address, path, settings)
        batch = batch_of().take(range(trainer.shard, 12, trainer.num_shards))
        if broken:
            before = [parameter.detach().clone() for core in trainer._cores for parameter in core.parameters()]
            nan = np.where(batch.loss_mask, np.float32("nan"), np.float32(0))
            try:
                trainer.step([replace(batch, advantages=nan) if trainer.shard == 0 else batch])
            except NonFiniteError as error:
                message = str(error)
            after = [parameter for core in trainer._cores for parameter in core.parameters()]
            untouched = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        norms.append(trainer.step([batch])["grad_norm"])
        trainer.close()
    return message, untouched, norms
