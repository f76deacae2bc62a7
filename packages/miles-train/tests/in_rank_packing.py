"""Packed beside padded, in a rank's process."""

import numpy as np
from in_rank_trainer import make_trainer
from train_tiny import batch_of

from miles_core.algorithms.losses import Objective, PPOClip
from miles_core.errors import InputError
from miles_train.megatron import runtime
from miles_train.megatron.packing import rounded_up
from miles_train.megatron.specs.modules import CausalAttention


def packed_and_padded(address, path, settings):
    """Logprobs, a step's metrics and the weights after it, of both."""
    results = []
    for packed in (True, False):
        trainer = make_trainer(
            address,
            path,
            {"lr": 1e-2, **settings},
            Objective(PPOClip(), entropy_coef=0.01),
            packed=packed,
            micro_batch_tokens=37,
        )
        batch = batch_of().take(range(trainer.shard, 12, trainer.num_shards))
        before = trainer.logprobs(batch)
        metrics = trainer.step([batch])
        weights = {name: tensor.numpy().copy() for name, tensor in trainer.weights()}
        results.append((before, metrics, weights))
        trainer.close()
    return results


def which_are_packed(address, path):
    """What the parameter decides: asked for, not asked for, and asked for where a module refuses."""
    answers = []
    for packed in (True, None):
        trainer = make_trainer(address, path, packed=packed)
        answers.append(trainer._learner.packed)
        trainer.close()
    CausalAttention.supports_packing = False
    try:
        make_trainer(address, path, packed=True)
    except InputError as error:
        answers.append(str(error))
    finally:
        del CausalAttention.supports_packing
        runtime.stop()
    return answers


def backends(address, path):
    """The backend of a trainer on this machine, and the error where it cannot be had."""
    trainer = make_trainer(address, path, {"bf16": True})
    answers = [trainer._args.transformer_impl, trainer._args.apply_rope_fusion]
    trainer.close()
    try:
        make_trainer(address, path, {"bf16": True, "transformer_impl": "transformer_engine"})
    except InputError as error:
        answers.append(str(error))
    return answers


def rounded_lengths(_):
    return [rounded_up(length) for length in (1, 128, 129, 1000, 1024, 1025, 5000)], np.all(
        [length <= rounded_up(length) <= max(128, 1.25 * length + 1) for length in range(513, 20000, 7)]
    )
