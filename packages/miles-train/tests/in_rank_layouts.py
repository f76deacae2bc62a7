"""The trainer in one layout of ranks, in the ranks' processes: what `layout_checks` holds against a single rank."""

import torch
from in_rank_trainer import make_trainer
from train_tiny import batch_of


class SequenceRatio:
    """A loss of whole samples (GSPO's ratio, Zheng et al. 2025, arXiv:2507.18071), and of the entropy."""

    needs_entropy = True

    def __call__(self, inputs):
        count = int(inputs.sample_index.max()) + 1
        d = torch.where(inputs.loss_mask, inputs.logprobs - inputs.old_logprobs.detach(), 0.0)
        sums = d.new_zeros(count).index_add(0, inputs.sample_index, d)
        sizes = d.new_zeros(count).index_add(0, inputs.sample_index, inputs.loss_mask.to(d.dtype))
        ratio = (sums / sizes.clamp(min=1)).exp()[inputs.sample_index]
        return -inputs.advantages * ratio - 0.1 * inputs.entropy, {"ratio": ratio.detach()}


# Updates of 0.1 times the gradient, all but linear in it: Adam's own would be of one size for every gradient.
LINEAR = {"lr": 1e3, "adam_eps": 1e4, "clip_grad": 0.0, "weight_decay": 0.0}


def run(address, path, settings):
    """Logprobs, then a step of two updates.

    Returns:
        The shard that the rank brought and the logprobs of its samples; metrics; from rank 0 the weights after it.
    """
    # A micro-batch holds few samples: the shards need different numbers of them.
    trainer = make_trainer(address, path, {**LINEAR, **settings}, SequenceRatio(), micro_batch_tokens=30)
    mine = range(trainer.shard, 12, trainer.num_shards)
    shards = [batch_of(seed).take(mine) for seed in (0, 1)]
    logprobs = trainer.logprobs(shards[0])
    metrics = trainer.step(shards)
    weights = {name: tensor.float().numpy().copy() for name, tensor in trainer.weights()}
    brought = trainer.shard, trainer.num_shards
    trainer.close()
    return brought, logprobs, metrics, weights if address[0] == 0 else {}
