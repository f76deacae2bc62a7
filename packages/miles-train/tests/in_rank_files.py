"""Loading, export and checkpoints of several ranks, in the ranks' processes."""

import os
import signal
import time
from dataclasses import replace

import torch
from in_rank_trainer import make_trainer
from torch import distributed
from train_tiny import batch_of

from miles_core.errors import InputError
from miles_train.errors import CheckpointError
from miles_train.megatron.weights import TABLES
from miles_train.model_dir import open_model_directory

_kept = {}


def round_trip(address, path, settings, folder):
    """Export what was loaded, after holding pieces and whole weights against the directory."""
    trainer = make_trainer(address, path, settings)
    directory = open_model_directory(path)
    with directory.reader() as read:
        seen = 0
        for piece in trainer.pieces():
            box = read(piece.name)
            for dim, (first, size) in enumerate(zip(piece.offsets, piece.tensor.shape, strict=True)):
                box = box.narrow(dim, first, size)
            assert torch.equal(box, piece.tensor) and piece.shape == directory.tensors[piece.name].shape, piece.name
            seen += piece.tensor.numel() * piece.is_first
        names = set()
        for name, tensor in trainer.weights():
            assert torch.equal(read(name), tensor), name
            names.add(name)
        assert names == set(directory.tensors)
        everything = torch.tensor(seen)
        distributed.all_reduce(everything)
        assert everything == sum(read(name).numel() for name in names)
    trainer.export(folder, max_shard_bytes=20_000)
    trainer.close()


def train_and_save(address, path, settings, folder):
    """Two updates and a checkpoint; the optimizer's state is kept in the process for `compare`."""
    trainer = make_trainer(address, path, settings)
    for seed in range(2):
        trainer.step([batch_of(seed).take(range(trainer.shard, 12, trainer.num_shards))])
    trainer.save(folder / "saved", {"step": 2})
    trainer.export(folder / "trained")
    _kept["state"] = _optimizer_state(trainer)
    trainer.close()


def load_and_save(address, path, settings, folder, loaded, saved, state=None):
    """Load a checkpoint of another layout, export it and save it again."""
    trainer = make_trainer(address, path, settings)
    assert trainer.load(folder / loaded) == (state or {"step": 2})
    trainer.export(folder / f"hf-{saved}")
    trainer.save(folder / saved, {"step": 2}, asynchronous=True)
    trainer.close()


def compare(address, path, settings, folder, loaded):
    """Load what other layouts loaded and saved: the optimizer's state must be what this layout saved first."""
    trainer = make_trainer(address, path, settings)
    trainer.load(folder / loaded)
    found = _optimizer_state(trainer)
    trainer.close()
    kept = _kept.pop("state")
    assert len(found) == len(kept)
    for mine, theirs in zip(found, kept, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


def _optimizer_state(trainer):
    optimizer = trainer._learner.optimizer
    states = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                states.append({"param": parameter.detach().clone()})
                states[-1].update({name: tensor.clone() for name, tensor in state.items()})
    return states


def save_while_training(address, path, folder):
    """An asynchronous save holds the weights of its moment, though training went on."""
    trainer = make_trainer(address, path)
    shard = batch_of().take(range(address[0], 12, address[1]))
    trainer.step([shard])
    trainer.export(folder / "then")
    for step in range(3):
        trainer.save(folder / f"step-{step}", {"step": step}, keep=2, asynchronous=True)
        if step == 2:
            trainer.step([shard])
            trainer.step([shard])
    trainer.finish_saving()
    assert trainer.load(folder) == {"step": 2}
    trainer.export(folder / "loaded")
    trainer.close()


def die_while_saving(address, path, folder):
    """Be killed between the writing of the tensors and the naming of the folder."""
    trainer = make_trainer(address, path)
    trainer.save(folder / "a", {"step": 0})
    trainer.step([batch_of()])
    trainer.save(folder / "b", {"step": 1}, asynchronous=True)
    os.kill(os.getpid(), signal.SIGKILL)


def save_to_a_full_disk(address, path, folder):
    """Errors of a save, an asynchronous one and an export to a disk without room; then a save that works."""
    trainer = make_trainer(address, path)
    shard = batch_of().take(range(address[0], 12, address[1]))
    errors = []

    def asynchronous():
        trainer.save(folder / "full" / "b", {"step": 0}, asynchronous=True)
        for _ in range(200):
            trainer.step([shard])
            time.sleep(0.02)

    for action in (
        lambda: trainer.save(folder / "full" / "a", {"step": 0}),
        asynchronous,
        lambda: trainer.export(folder / "full" / "hf"),
    ):
        try:
            action()
        except CheckpointError as error:
            errors.append(str(error))
    trainer.save(folder / "room", {"step": 1})
    trainer.close()
    return errors


def decode(weight, scale):
    """FP8 of blocks of 16 x 32 to numbers."""
    factors = scale.repeat_interleave(16, 0)[: len(weight)].repeat_interleave(32, 1)[:, : weight.shape[1]]
    return weight.float() * factors


def export_fp8(address, path, settings, folder):
    """Export what was decoded; the error of a trainer without a decoder."""
    trainer = make_trainer(address, path, settings, decode=decode)
    trainer.export(folder)
    trainer.close()
    try:
        make_trainer(address, path, settings)
    except InputError as error:
        return str(error)


def round_trip_beside(address, path, settings, folder):
    """Export a model with marked rows and tensors that the trainer does not hold, before and after an update."""
    make = TABLES["Qwen3ForCausalLM"]

    def table(config, stored=()):
        plain = make(config, stored)
        rows = [replace(row, fp32=row.hf == ("model.norm.weight",)) for row in plain.rows]
        return replace(plain, rows=tuple(rows), outside=("visual.*",))

    TABLES["Qwen3ForCausalLM"] = table
    try:
        trainer = make_trainer(address, path, {**settings, "bf16": True})
        trainer.export(folder / "before", max_shard_bytes=20_000)
        trainer.step([batch_of().take(range(trainer.shard, 12, trainer.num_shards))])
        trainer.export(folder / "after", max_shard_bytes=20_000)
        trainer.close()
    finally:
        TABLES["Qwen3ForCausalLM"] = make
