"""The examiner of trainers: every implementation of `Trainer` must pass `CHECKS`.

A check is a plain function that raises AssertionError and says what does not hold. It runs in the trainer's process,
makes trainers through the subject's factory one at a time, and closes them:

    subject = Subject(make=lambda: MyTrainer("tiny-model", lr=1e-3), model_path="tiny-model", vocab_size=16)
    for check in CHECKS:
        check(subject, folder)
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from miles_core.types import Batch, Floats
from miles_train.errors import CheckpointError, NonFiniteError
from miles_train.model_dir import open_model_directory
from miles_train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined.

    Attributes:
        make: gives a trainer of one rank in the same initial state each time: float32, deterministic, a clipped policy
            loss without regularisers, a learning rate at which a few updates on one batch help, no warm-up.
        model_path: the Hugging Face directory it starts from.
        vocab_size: of the model.
    """

    make: Callable[[], Trainer]
    model_path: Path
    vocab_size: int

    def batch(self, seed: int = 0, num_samples: int = 12) -> Batch:
        """Random samples of uneven lengths, the second half of each trained with advantage 1."""
        rng = np.random.default_rng(seed)
        lengths = rng.integers(3, 14, num_samples).astype(np.int32)
        positions = np.concatenate([np.arange(length) for length in lengths])
        loss_mask = positions >= np.repeat(lengths // 2, lengths)
        return Batch(
            tokens=rng.integers(0, self.vocab_size, lengths.sum()).astype(np.int32),
            lengths=lengths,
            loss_mask=loss_mask,
            rollout_logprobs=np.zeros(lengths.sum(), np.float32),
            advantages=loss_mask.astype(np.float32),
            loss_weights=(loss_mask / loss_mask.sum()).astype(np.float32),
            rewards=np.ones(num_samples, np.float32),
            versions=np.zeros(num_samples, np.int64),
            group_index=np.arange(num_samples, dtype=np.int32),
            num_loss_tokens=int(loss_mask.sum()),
            num_samples=num_samples,
        )


Check = Callable[[Subject, Path], None]


def learns(subject: Subject, folder: Path) -> None:
    """Updates on one batch raise the log probability of its rewarded tokens."""
    batch = subject.batch()
    with closing(subject.make()) as trainer:
        before = trainer.logprobs(batch)[batch.loss_mask].mean()
        for _ in range(5):
            trainer.step([batch])
        after = trainer.logprobs(batch)[batch.loss_mask].mean()
    assert after > before, f"mean logprob of rewarded tokens went from {before} to {after}"


def says_its_shard(subject: Subject, folder: Path) -> None:
    """The only rank brings the only shard."""
    with closing(subject.make()) as trainer:
        told = trainer.shard, trainer.num_shards
    assert told == (0, 1), f"shard and num_shards of a trainer of one rank are {told}"


def resumes(subject: Subject, folder: Path) -> None:
    """Saving and loading between updates changes nothing, bit for bit, and the caller's state comes back."""
    batches = [subject.batch(seed) for seed in range(4)]
    state = {"weight_version": 2, "cursor": {"epoch": 1, "position": [3, 4]}}
    with closing(subject.make()) as trainer:
        for batch in batches[:2]:
            trainer.step([batch])
        trainer.save(folder / "step-2", state)
        for batch in batches[2:]:
            trainer.step([batch])
        expected = _weights(trainer)
    with closing(subject.make()) as trainer:
        assert trainer.load(folder) == state, "the state given to save did not come back"
        for batch in batches[2:]:
            trainer.step([batch])
        _assert_equal(_weights(trainer), expected)


def resumes_from_the_start(subject: Subject, folder: Path) -> None:
    """A checkpoint from before the first update works like any other."""
    batch = subject.batch()
    with closing(subject.make()) as trainer:
        trainer.save(folder / "step-0", {})
        trainer.step([batch])
        expected = _weights(trainer)
        trainer.load(folder / "step-0")  # also back in time, in a trainer that has moved on
        trainer.step([batch])
        _assert_equal(_weights(trainer), expected)


def refuses_what_is_no_checkpoint(subject: Subject, folder: Path) -> None:
    """Loading from an empty folder raises CheckpointError."""
    with closing(subject.make()) as trainer:
        try:
            trainer.load(folder)
        except CheckpointError:
            return
    raise AssertionError("load from an empty folder must raise CheckpointError")


def names_weights(subject: Subject, folder: Path) -> None:
    """`weights` gives the checkpoint's tensors: the same names, and before any update the same values."""
    directory = open_model_directory(subject.model_path)
    with closing(subject.make()) as trainer:
        weights = _weights(trainer)
    assert set(weights) == set(directory.tensors), f"names differ: {set(weights) ^ set(directory.tensors)}"
    with directory.reader() as read:
        _assert_equal(weights, {name: read(name) for name in weights})


def exports(subject: Subject, folder: Path) -> None:
    """The exported directory holds the updated weights under the same names, bit for bit."""
    with closing(subject.make()) as trainer:
        trainer.step([subject.batch()])
        trainer.export(folder / "hf")
        expected = _weights(trainer)
    directory = open_model_directory(folder / "hf")
    with directory.reader() as read:
        _assert_equal({name: read(name) for name in directory.tensors}, expected)


def ignores_order_and_company(subject: Subject, folder: Path) -> None:
    """A token's log probability depends on its own sample alone, not on padding, order or neighbours."""
    batch = subject.batch()
    order = np.random.default_rng(1).permutation(len(batch.lengths))
    with closing(subject.make()) as trainer:
        together = trainer.logprobs(batch)
        shuffled = trainer.logprobs(batch.take(order))
        alone = [trainer.logprobs(batch.take([index])) for index in order]
    expected = np.concatenate([_of_sample(batch, together, index) for index in order])
    np.testing.assert_allclose(shuffled, expected, atol=1e-5, err_msg="order matters")
    np.testing.assert_allclose(np.concatenate(alone), expected, atol=1e-5, err_msg="company matters")
    assert (together[batch.offsets[:-1]] == 0).all(), "nothing predicts a first token: its logprob must be 0"


def uses_old_logprobs(subject: Subject, folder: Path) -> None:
    """With several minibatches the ratio is taken to the weights before the step: 1 in the first update only."""
    batch = subject.batch()
    with closing(subject.make()) as trainer:
        once = trainer.step([batch])
    with closing(subject.make()) as trainer:
        twice = trainer.step([batch, batch])
    assert once["ratio"] == 1.0, f"mean ratio of a single update is {once['ratio']}"
    assert twice["ratio"] != 1.0, "mean ratio over two updates on one batch is 1: old logprobs follow the policy"


def reports_the_gap(subject: Subject, folder: Path) -> None:
    """`logprob_gap` and `k3_kl` are 0 for the trainer's own logprobs, and what was added to them otherwise."""
    batch = subject.batch()
    with closing(subject.make()) as trainer:
        own = np.where(batch.loss_mask, trainer.logprobs(batch), np.float32(0))
        off = own.copy()
        where = int(np.flatnonzero(batch.loss_mask)[-1])
        off[where] -= 0.5
        exact = trainer.step([replace(batch, rollout_logprobs=own)])
    with closing(subject.make()) as trainer:
        shifted = trainer.step([replace(batch, rollout_logprobs=off)])
    count = batch.loss_mask.sum()
    for name, value in (("logprob_gap", 0.5), ("k3_kl", np.exp(0.5) - 1.5)):
        assert abs(exact[name]) < 1e-5, f"{name} of the trainer's own logprobs is {exact[name]}"
        assert abs(shifted[name] - value / count) < 1e-5, f"{name} is {shifted[name]} instead of {value / count}"


def survives_an_empty_shard(subject: Subject, folder: Path) -> None:
    """A rank that was dealt no samples takes part all the same."""
    batch = subject.batch()
    with closing(subject.make()) as trainer:
        trainer.step([batch.take([])])
        trainer.step([batch, batch.take([])])


def stops_on_a_non_finite_loss(subject: Subject, folder: Path) -> None:
    """A NaN raises NonFiniteError and leaves the weights alone, and the trainer goes on to learn."""
    batch = subject.batch()
    broken = replace(batch, advantages=np.where(batch.loss_mask, np.float32("nan"), np.float32(0)))
    with closing(subject.make()) as trainer:
        before = _weights(trainer)
        try:
            trainer.step([broken])
        except NonFiniteError:
            _assert_equal(_weights(trainer), before)
        else:
            raise AssertionError("a NaN advantage must raise NonFiniteError")
        after_error = trainer.step([batch])
    with closing(subject.make()) as trainer:
        assert trainer.step([batch])["grad_norm"] == after_error["grad_norm"], "the error left something behind"


CHECKS: tuple[Check, ...] = (
    learns,
    says_its_shard,
    resumes,
    resumes_from_the_start,
    refuses_what_is_no_checkpoint,
    names_weights,
    exports,
    ignores_order_and_company,
    uses_old_logprobs,
    reports_the_gap,
    survives_an_empty_shard,
    stops_on_a_non_finite_loss,
)


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.weights()}


def _assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(weights) == set(expected), f"names differ: {set(weights) ^ set(expected)}"
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, among them {different[:4]}"


def _of_sample(batch: Batch, column: Floats, index: int) -> Floats:
    return column[batch.offsets[index] : batch.offsets[index + 1]]
