"""The trainer in layouts of several ranks, in the ranks' processes: logprobs and one step, to be held against one rank."""

import numpy as np
from in_rank_trainer import make_trainer
from train_tiny import batch_of

from miles_train.megatron.weights.load import Source, load_weights
from miles_train.megatron.weights.names import local_tensors
from miles_train.model_dir import open_model_directory


def run(address, path, settings, expected=None, export=None, **more):
    """Logprobs before a step, its metrics, and how far the weights after it are from those of a directory.

    Args:
        expected: directory of the weights that there should be after the step.
        export: where to write the weights after the step.

    Returns:
        shard, logprobs of its samples, metrics, {name: (largest, mean difference)} of this rank's weights.
    """
    trainer = make_trainer(address, path, settings, **more)
    mine = batch_of().take(range(trainer.shard, 12, trainer.num_shards))
    logprobs = trainer.logprobs(mine)
    metrics = trainer.step([mine])
    differences = {}
    if export is not None:
        trainer.export(export)
    if expected is not None:
        ours = [(name, tensor.detach().clone()) for name, tensor in local_tensors(trainer._cores)]
        load_weights(trainer._cores, trainer._table, Source(open_model_directory(expected)))
        for (name, mine), (_, theirs) in zip(ours, local_tensors(trainer._cores), strict=True):
            difference = np.abs((mine.float() - theirs.detach().float()).numpy())
            differences[name] = float(difference.max()), float(difference.mean())
    trainer.close()
    return trainer.shard, logprobs, metrics, differences
