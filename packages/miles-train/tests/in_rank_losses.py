"""Losses of every shape through a whole trainer."""

import dataclasses

import numpy as np
from in_rank_trainer import make_trainer
from train_tiny import batch_of

from miles_core.algorithms.corrections import MIS, TIS
from miles_core.algorithms.losses import DPO, GSPO, KLTerm, Objective

LOSSES = {
    "dpo": DPO(),
    "gspo": Objective(GSPO(0.2, 0.2), (TIS("sequence"), MIS("geometric")), KLTerm(0.1), entropy_coef=0.01),
}


def pairs():
    """Six groups of a chosen and a rejected sample, with a reference."""
    batch = batch_of()
    samples = np.repeat(np.arange(12), batch.lengths)
    rng = np.random.default_rng(1)
    return dataclasses.replace(
        batch,
        rollout_logprobs=np.where(batch.loss_mask, -rng.random(len(samples)) * 4, 0).astype(np.float32),
        advantages=np.where(batch.loss_mask, 1 - 2 * (samples % 2), 0).astype(np.float32),
        group_index=(np.arange(12) // 2).astype(np.int32),
        columns={"ref_logprobs": (-rng.random(len(samples)) * 4).astype(np.float32)},
    )


def step(address, path, name, settings, options):
    """Metrics and weights after a step on the pairs, dealt to ranks by whole groups."""
    trainer = make_trainer(address, path, settings, loss=LOSSES[name], **options)
    batch = pairs()
    mine = np.flatnonzero(batch.group_index % trainer.num_shards == trainer.shard)
    metrics = trainer.step([batch.take(mine)])
    weights = {key: tensor.numpy().copy() for key, tensor in trainer.weights()}
    trainer.close()
    return metrics, weights
