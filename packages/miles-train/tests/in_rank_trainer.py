"""What the tests of the trainer do inside a rank's process."""

import functools
import os
from pathlib import Path

import psutil
import torch
from train_tiny import VOCAB, batch_of

from miles_core.algorithms.losses import Objective, PPOClip
from miles_core.errors import InputError
from miles_train import conformance
from miles_train.conformance import Subject
from miles_train.errors import CheckpointError, NonFiniteError
from miles_train.megatron import MegatronTrainer, logprobs
from miles_train.megatron.runtime import Address
from miles_train.megatron.trainer import Hooks

SETTINGS = {"lr": 1e-3, "clip_grad": 1.0}


def make_trainer(address, path, settings=None, loss=None, **more):
    torch.set_num_threads(1)
    rank, world_size, host, ports = address
    meeting = Address(rank, world_size, host, next(ports))
    return MegatronTrainer(path, {**SETTINGS, **(settings or {})}, loss or PPOClip(), address=meeting, **more)


def run_check(address, check, path, folder):
    make = functools.partial(make_trainer, address, path, deterministic=True)
    getattr(conformance, check)(Subject(make, path, VOCAB), folder)


def train(address, path, settings, far_off=None):
    rank, world_size = address[:2]
    trainer = make_trainer(address, path, settings)
    metrics = []
    for seed in range(3):
        batch = batch_of(seed)
        if far_off is not None:
            batch.rollout_logprobs[batch.offsets[far_off + 1] - 1] = -50.0
        metrics.append(trainer.step([batch.take(range(rank, 12, world_size))]))
    weights = {name: tensor.numpy().copy() for name, tensor in trainer.weights()}
    trainer.close()
    return metrics, weights


def train_all_on_rank_0(address, path):
    trainer = make_trainer(address, path)
    metrics = trainer.step([batch_of().take(range(12) if address[0] == 0 else [])])
    weights = {name: tensor.numpy().copy() for name, tensor in trainer.weights()}
    trainer.close()
    return {name: value for name, value in metrics.items() if name != "gap_shard"}, weights


def check_resume(address, path, folder):
    make = functools.partial(make_trainer, address, path, deterministic=True)
    conformance.resumes(Subject(make, path, VOCAB), folder)
    conformance.resumes_from_the_start(Subject(make, path, VOCAB), folder / "again")


def train_twice(address, path, settings):
    results = [train(address, path, chosen) for chosen in (None, settings)]
    return [(metrics[-1]["loss"], weights) for metrics, weights in results]


def train_in_pieces(address, path):
    results = []
    for max_tokens in (1000, 20):
        trainer = make_trainer(address, path, micro_batch_tokens=max_tokens)
        metrics = trainer.step([batch_of()])
        results.append((metrics, {name: tensor.numpy().copy() for name, tensor in trainer.weights()}))
        trainer.close()
    return results


def train_in_chunks(address, path):
    """A step with an entropy bonus, with all logits at once and three rows at a time."""
    results = []
    whole = logprobs.MAX_LOGITS_BYTES
    for size in (whole, 4 * VOCAB * 3):
        logprobs.MAX_LOGITS_BYTES = size
        trainer = make_trainer(address, path, loss=Objective(PPOClip(), entropy_coef=0.01))
        metrics = trainer.step([batch_of()])
        results.append((metrics, {name: tensor.numpy().copy() for name, tensor in trainer.weights()}))
        trainer.close()
    logprobs.MAX_LOGITS_BYTES = whole
    return results


def train_bf16(address, path, export):
    trainer = make_trainer(address, path, {"bf16": True})
    batch = batch_of()
    before = trainer.logprobs(batch)[batch.loss_mask].mean()
    for _ in range(5):
        trainer.step([batch])
    after = trainer.logprobs(batch)[batch.loss_mask].mean()
    trainer.export(export)
    trainer.close()
    return before, after


def check_bf16_resume(address, path, folder):
    # At this rate bf16 weights alone would round most updates away: resuming from them would show.
    make = functools.partial(make_trainer, address, path, {"bf16": True, "lr": 1e-4}, deterministic=True)
    conformance.resumes(Subject(make, path, VOCAB), folder)


def logprobs_at(address, path, temperature):
    trainer = make_trainer(address, path, temperature=temperature)
    logprobs = trainer.logprobs(batch_of())
    trainer.close()
    return logprobs


def save_four(address, path, folder):
    trainer = make_trainer(address, path)
    for step in range(4):
        trainer.save(folder / f"step-{step}", {"step": step}, keep=2)
    trainer.close()


def load_fails(address, path, folder):
    trainer = make_trainer(address, path)
    try:
        trainer.load(folder)
    except CheckpointError as error:
        return str(error)
    finally:
        trainer.close()


def record_hooks(address, path):
    calls = []
    hooks = Hooks(
        after_model_init=lambda model: calls.append(("after_model_init", [type(chunk).__name__ for chunk in model])),
        before_logprobs=lambda batch: calls.append(("before_logprobs", len(batch.lengths))),
        before_train_step=lambda batch: calls.append(("before_train_step", len(batch.lengths))),
        after_train_step=lambda metrics: calls.append(("after_train_step", "loss" in metrics)),
    )
    trainer = make_trainer(address, path, hooks=hooks)
    trainer.step([batch_of()])
    trainer.step([batch_of(), batch_of(1, 5)])
    trainer.close()
    return calls


def fails_to_start(address, path, settings):
    try:
        make_trainer(address, path, settings).close()
    except InputError as error:
        return str(error), torch.distributed.is_initialized()
    return "it started", True


def import_and_export(address, path, settings, folder):
    trainer = make_trainer(address, path, settings)
    trainer.export(folder)
    trainer.close()


class InfiniteGradient:
    """A loss of 0 whose gradient is infinite."""

    def __call__(self, inputs):
        return (inputs.logprobs - inputs.logprobs.detach()).sqrt(), {}


def step_with_infinite_gradient(address, path):
    """The error of the step, and whether the weights are those before it."""
    trainer = make_trainer(address, path, loss=InfiniteGradient())
    before = {name: tensor.clone() for name, tensor in trainer.weights()}
    shard = batch_of().take(range(address[0], 12, address[1]))
    try:
        trainer.step([shard])
    except NonFiniteError as error:
        return str(error), all(torch.equal(before[name], tensor) for name, tensor in trainer.weights())
    finally:
        trainer.close()


def fail_to_write(address, path, folder):
    """Errors of a save and two exports to where none can be written."""
    trainer = make_trainer(address, path)
    errors = []
    for write in (
        lambda: trainer.save(folder / "file" / "a", {"step": 0}),
        lambda: trainer.export(folder / "file" / "hf"),
        lambda: trainer.export(folder),
    ):
        try:
            write()
        except CheckpointError as error:
            errors.append(str(error))
    trainer.close()
    return errors


def write_again(address, path, folder):
    """Save to a folder that `latest` does not name, then to the one it names; export twice. The last save's error."""
    trainer = make_trainer(address, path)
    trainer.save(folder / "a", {"step": 0})
    trainer.save(folder / "b", {"step": 1})
    (folder / "latest").write_text("a\n")  # as after a crash between writing b and pointing to it
    trainer.save(folder / "b", {"step": 2})
    trainer.export(folder / "hf")
    trainer.step([batch_of().take(range(address[0], 12, address[1]))])
    trainer.export(folder / "hf")
    try:
        trainer.save(folder / "b", {"step": 3})
    except CheckpointError as error:
        return str(error)
    finally:
        trainer.close()


def run_example(_, code, folder):
    """Run the README's example with `folder` as working directory."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        names = {}
        exec(code, names)
        names["trainer"].close()
    finally:
        os.chdir(here)


def listens_on(address, path):
    """Addresses of the process's listening sockets while it trains."""
    trainer = make_trainer(address, path)
    trainer.step([batch_of()])
    found = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    trainer.close()
    return found
