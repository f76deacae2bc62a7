"""The step: forward, loss, backward, one optimizer update; and the numbers that come out of it.

old logprobs (a forward pass, only if there are several updates)
for each minibatch: zero gradients ▸ Megatron's schedule over micro-batches ▸ finite? ▸ schedule of lr ▸ optimizer
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from miles_core.algorithms.losses import Loss, LossInputs
from miles_core.algorithms.needs import needs_of
from miles_core.types import Batch
from miles_train.errors import NonFiniteError
from miles_train.megatron import cpu_shim, runtime
from miles_train.megatron.logprobs import token_logits, token_logprobs
from miles_train.megatron.upstream import (
    DistributedDataParallel,
    MegatronOptimizer,
    OptimizerParamScheduler,
    get_forward_backward_func,
    parallel_state,
)
from miles_train.microbatches import MicroBatch, cut, cut_packed


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """What a step works with.

    The loss is computed on the last pipeline stage, by every tensor- and context-parallel rank there on the same
    logprobs. Of these equal losses one is counted: that of the first of them.

    Attributes:
        chunks: this rank's pipeline chunks in their gradient buffers, one unless the pipeline is virtual.
        optimizer: over them.
        scheduler: of the optimizer's learning rate and weight decay.
        loss: per-token loss.
        vocab_size: without padding.
        micro_batch_tokens: most tokens of a micro-batch, padding included.
        temperature: of the sampling engine.
        device: of the model.
        packed: whether a micro-batch is one row of samples end to end, instead of padded rows.
    """

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    loss: Loss
    vocab_size: int
    micro_batch_tokens: int
    temperature: float
    device: torch.device
    packed: bool = False

    def logprobs(self, batch: Batch, *, all_tokens: bool) -> Tensor:
        """Log probability of each token under the current weights, without gradient.

        Args:
            batch: this rank's samples.
            all_tokens: compute all but the first token of each sample instead of those in loss_mask alone.

        Returns:
            float32 [T], on the model's device, on every stage; 0 where not computed.
        """
        column = torch.zeros(len(batch.tokens), device=self.device)
        micros = self._cut(batch, all_tokens=all_tokens)

        def forward(micro: MicroBatch, chunk: Any) -> tuple[Any, Callable[..., Any]]:
            output = self._token_logprobs(chunk, micro)
            if isinstance(output, tuple):  # on the last stage
                output = output[0]
            return output, lambda output, non_loss_data: output

        results = self._run(forward, micros, forward_only=True) if micros else []
        if _is_last_stage():
            for micro, logprobs in zip(micros, results, strict=True):
                column[runtime.on_device(micro.columns[micro.selected], self.device)] = logprobs
        return _from_last_stage(column)

    def step(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """Update once per minibatch.

        Args:
            minibatches: this rank's shard of each; every rank brings equally many. A shard may be empty.

        Returns:
            Metrics, equal on all ranks (see `_Sums.reduce`).

        Raises:
            NonFiniteError: a loss or gradient is not finite; the update did not happen. Earlier minibatches of the
                step did.
        """
        sums = _Sums(self.device)
        old: list[Tensor | None] = [None] * len(minibatches)
        if len(minibatches) > 1:
            old = [self.logprobs(batch, all_tokens=False) for batch in minibatches]
        first_sample = 0
        for batch, recomputed in zip(minibatches, old, strict=True):
            before = self._update(batch, recomputed, sums)
            sums.add_gap(batch, before, first_sample)
            first_sample += len(batch.lengths)
        return sums.reduce()

    def logits(self, batch: Batch) -> Tensor:
        """Logits that predict each token under the current weights, without gradient: many bytes, for tests of a model.

        Args:
            batch: some samples; the same on all ranks of a copy of the model.

        Returns:
            float32 [T, V], on the model's device, on every stage; 0 for the first token of each sample.
        """
        table = torch.zeros(len(batch.tokens), self.vocab_size, device=self.device)
        micros = self._cut(batch, all_tokens=True)

        def forward(micro: MicroBatch, chunk: Any) -> tuple[Any, Callable[..., Any]]:
            output = token_logits(chunk, micro, vocab_size=self.vocab_size, device=self.device)
            return output, lambda output, non_loss_data: output

        results = self._run(forward, micros, forward_only=True)
        if _is_last_stage():
            for micro, logits in zip(micros, results, strict=True):
                table[runtime.on_device(micro.columns[micro.selected], self.device)] = logits
        return _from_last_stage(table)

    def backward(self, batch: Batch) -> float:
        """Leave in the buffers the gradient that an update on the batch would use, summed over all ranks.

        Args:
            batch: this rank's samples.

        Returns:
            The loss summed over shards.

        Raises:
            NonFiniteError: it or the gradient is not finite.
        """
        return self._gradient(batch, None, _Sums(self.device))[1]

    def _update(self, batch: Batch, old: Tensor | None, sums: "_Sums") -> Tensor:
        """One optimizer update; returns the logprobs before it, [T], in loss_mask."""
        before, loss = self._gradient(batch, old, sums)
        self.scheduler.step(1)  # before the update, so that the first one of a warm-up is not done with lr = 0
        with cpu_shim.active():
            outcome: Any = self.optimizer.step()  # updated, gradient norm, zeros in the gradient
        sums.add_update(loss, float(outcome[1]), self._learning_rate())
        return before

    def _gradient(self, batch: Batch, old: Tensor | None, sums: "_Sums") -> tuple[Tensor, float]:
        """Forward and backward; the logprobs, [T], in loss_mask, and the loss summed over shards."""
        before = torch.zeros(len(batch.tokens), device=self.device) if old is None else old
        is_empty = not len(batch.lengths)
        if is_empty:
            # Every shard runs the loss, also on an empty shard: its metrics' names must be known everywhere.
            batch, old = _placeholder(batch), None
        columns = _Columns.of(batch, self.device)
        loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)

        def micro_loss(micro: MicroBatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            num_tokens = torch.zeros((), dtype=torch.int, device=self.device)  # unused: the weights normalise
            if not len(micro.columns):
                return output[0].sum(), num_tokens, {}  # a filler: 0
            inputs, weights = columns.inputs(micro, *output, old, needs_of(self.loss))
            with runtime.others_code():
                per_token, metrics = self.loss(inputs)
            if old is None and not is_empty:
                before[columns.flat(micro)] = inputs.logprobs.detach()
            total = (weights * per_token).masked_fill(~inputs.loss_mask, 0.0).sum()
            loss_sum.add_(total.detach())
            sums.add_tokens({**metrics, "entropy": columns.scatter(micro, output[1])}, inputs.loss_mask)
            return total, num_tokens, {}

        weight_ahead = self._weight_ahead(batch)

        def forward(micro: MicroBatch, chunk: Any) -> tuple[Any, Callable[..., Any]]:
            return self._token_logprobs(chunk, micro, weight_ahead), partial(micro_loss, micro)

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(forward, self._cut(batch), forward_only=False)
        return before, self._check_finite(loss_sum)

    def _cut(self, batch: Batch, *, all_tokens: bool = False) -> list[MicroBatch]:
        """Micro-batches of the batch, and fillers where ranks or stages need another number of them."""
        micros: list[MicroBatch] = []
        whole_groups = "group_index" in needs_of(self.loss)
        if len(batch.lengths) and self.packed:
            multiple = parallel_state.get_tensor_model_parallel_world_size()
            micros = list(
                cut_packed(
                    batch,
                    self.micro_batch_tokens,
                    all_tokens=all_tokens,
                    multiple=multiple,
                    whole_groups=whole_groups,
                )
            )
        elif len(batch.lengths):
            micros = list(cut(batch, self.micro_batch_tokens, all_tokens=all_tokens, whole_groups=whole_groups))
        return micros + [_filler()] * (self._num_micro_batches(len(micros)) - len(micros))

    def _num_micro_batches(self, count: int) -> int:
        config: Any = self.chunks[0].config
        if config.num_moe_experts and parallel_state.get_data_parallel_world_size() > 1:
            # Ranks that bring different samples may hold experts for each other: each must take part every time.
            most = torch.tensor(count, device=self.device)
            distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
            count = int(most)
        if len(self.chunks) > 1:
            # Interleaved stages take micro-batches in groups of as many as there are stages.
            stages = parallel_state.get_pipeline_model_parallel_world_size()
            count = -(-count // stages) * stages
        return count

    def _weight_ahead(self, batch: Batch) -> float:
        """Weight of a token's -log p in the loss of multi-token prediction: a mean over tokens and layers, scaled."""
        config: Any = self.chunks[0].config
        if not config.mtp_num_layers:
            return 0.0
        return config.mtp_loss_scaling_factor / config.mtp_num_layers / max(1, batch.num_loss_tokens)

    def _token_logprobs(self, chunk: Any, micro: MicroBatch, weight_ahead: float = 0.0) -> Any:
        return token_logprobs(
            chunk,
            micro,
            vocab_size=self.vocab_size,
            temperature=self.temperature,
            entropy_grad="entropy" in needs_of(self.loss),
            device=self.device,
            weight_ahead=weight_ahead,
        )

    def _run(
        self,
        forward: Callable[[MicroBatch, Any], tuple[Any, Callable[..., Any]]],
        micros: list[MicroBatch],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's schedule over the micro-batches.

        `forward` is called for each of them with each chunk of the rank; the function that it returns, on the last
        stage alone. Without gradient, what that returned comes back, in the order of the micro-batches.

        Virtual stages need Megatron's overlapped communication, which is what its arguments say by default. Batched, a
        stage sends activations on and gradients back in one go, and where there are two stages both go to the same
        rank, which takes one for the other: nothing fails, and losses and gradients are wrong (`validate_args` in
        megatron/training/arguments.py refuses that; configs made by hand do not meet it).
        """

        def forward_step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Any, Callable[..., Any]]:
            return forward(next(iterator), chunk)

        with cpu_shim.active(), torch.set_grad_enabled(not forward_only):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=[iter(micros) for _ in self.chunks],
                model=list(self.chunks),
                num_microbatches=len(micros),
                seq_length=1,  # not read: stages tell each other the shapes (`arguments`, variable_seq_lengths)
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _check_finite(self, loss_sum: Tensor) -> float:
        """The loss summed over shards; raises on all ranks if it or any gradient is not finite."""
        gradients = [
            buffer.grad_data.norm() for chunk in self.chunks for buffer in (*_buffers(chunk), *_expert_buffers(chunk))
        ]
        norm = torch.stack(gradients).sum().double() if gradients else loss_sum.new_zeros(())
        both = torch.stack([loss_sum if _counts() else loss_sum.new_zeros(()), norm])
        distributed.all_reduce(both)
        loss, norm = both.tolist()
        for name, value in (("loss", loss), ("gradient", norm)):
            if not np.isfinite(value):
                raise NonFiniteError(
                    f"{name} = {value} in update {self.scheduler.num_steps + 1}: it must be finite. The update was not "
                    "done and the weights are those before it. Look at the batch's rollout_logprobs and advantages, "
                    "lower train.megatron.lr or train.megatron.clip_grad, and resume from the last checkpoint."
                )
        return loss

    def _learning_rate(self) -> float:
        return max(float(group["lr"]) for group in self.optimizer.param_groups)


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of a batch on the model's device."""

    rollout_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor
    more: Mapping[str, Tensor]
    group_index: np.ndarray

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "_Columns":
        names = ("rollout_logprobs", "advantages", "loss_mask", "loss_weights")
        more = {name: runtime.on_device(column, device) for name, column in batch.columns.items()}
        return cls(
            *(runtime.on_device(getattr(batch, name), device) for name in names),
            more=more,
            group_index=batch.group_index,
        )

    def flat(self, micro: MicroBatch) -> Tensor:
        """Where the tokens of a micro-batch lie in the batch's columns, int64 [T]."""
        return runtime.on_device(micro.columns, self.loss_mask.device)

    def scatter(self, micro: MicroBatch, values: Tensor) -> Tensor:
        """[M] at the selected tokens to [T] over all tokens of the micro-batch, 0 elsewhere."""
        selected = runtime.on_device(micro.selected, values.device)
        return values.new_zeros(len(micro.columns)).index_put((selected,), values)

    def inputs(
        self, micro: MicroBatch, logprobs: Tensor, entropy: Tensor, old: Tensor | None, needs: frozenset[str]
    ) -> tuple[LossInputs, Tensor]:
        """What the loss sees of a micro-batch, and the weights of its tokens, [T]."""
        flat = self.flat(micro)
        full = self.scatter(micro, logprobs)
        sample_index = np.repeat(np.arange(len(micro.lengths)), micro.lengths)
        more = {name: self.more[name][flat] for name in needs & self.more.keys()}
        if "group_index" in needs:
            _, group_index = np.unique(self.group_index[micro.samples], return_inverse=True)
            more["group_index"] = runtime.on_device(np.repeat(group_index, micro.lengths), flat.device)
        inputs = LossInputs(
            logprobs=full,
            old_logprobs=full.detach() if old is None else old[flat],
            rollout_logprobs=self.rollout_logprobs[flat],
            advantages=self.advantages[flat],
            loss_mask=self.loss_mask[flat],
            sample_index=runtime.on_device(sample_index, flat.device),
            entropy=self.scatter(micro, entropy) if "entropy" in needs else None,
            **more,
        )
        return inputs, self.loss_weights[flat]


@dataclass(slots=True, eq=False)
class _Sums:
    """Sums over tokens and updates, reduced over shards once, at the end of the step.

    On stages before the last there is nothing to sum: they are told the outcome.
    """

    device: torch.device
    tokens: dict[str, Tensor] = field(default_factory=dict)
    updates: list[tuple[float, float, float]] = field(default_factory=list)
    largest: tuple[float, int, int] = (-1.0, -1, -1)

    def add_tokens(self, columns: Mapping[str, Tensor], mask: Tensor) -> None:
        """Add per-token columns [T] over the mask."""
        for name, column in {**columns, "": torch.ones_like(mask, dtype=torch.float32)}.items():
            # Not an index by the mask: its length would be waited for.
            total = column.detach().masked_fill(~mask, 0).sum(dtype=torch.float64)
            self.tokens[name] = self.tokens[name] + total if name in self.tokens else total

    def add_gap(self, batch: Batch, logprobs: Tensor, first_sample: int) -> None:
        """Add the difference of trainer and engine over loss_mask: d = logprobs - rollout_logprobs."""
        mask = torch.from_numpy(batch.loss_mask).to(self.device)
        d = logprobs - torch.from_numpy(batch.rollout_logprobs).to(self.device)
        # k3 estimator of KL(rollout || trainer): http://joschu.net/blog/kl-approx.html
        gap = {"logprob_gap": d.abs(), "k3_kl": d.exp() - d - 1}
        for name, column in gap.items():
            total = column[mask].sum(dtype=torch.float64)
            self.tokens[name] = self.tokens[name] + total if name in self.tokens else total
        if not mask.any():
            return
        worst = int(d.abs().masked_fill(~mask, -1.0).argmax())
        value = float(d[worst].abs())
        if not value <= self.largest[0]:  # also where it is not a number
            sample = int(np.searchsorted(batch.offsets, worst, side="right")) - 1
            self.largest = (value, first_sample + sample, worst - int(batch.offsets[sample]))

    def add_update(self, loss: float, grad_norm: float, lr: float) -> None:
        """Add an update; its numbers are equal on all ranks."""
        self.updates.append((loss, grad_norm, lr))

    def reduce(self) -> dict[str, float]:
        """The metrics of the step.

        `loss` and `grad_norm` are means over its updates, `lr` is the last one's. `entropy` and what the loss reported
        are means over trained tokens at the update that trained them; `logprob_gap` = mean |d| and `k3_kl` =
        mean(exp(d) - d - 1) over trained tokens, with d = log p_trainer - log p_rollout before the update (before the
        first one, if there are several). `gap_max` is the largest |d|, found at token `gap_position` of sample
        `gap_sample` in shard `gap_shard`, counting samples over its minibatches.
        """
        return _told_by_last_stage(self._reduce_over_shards() if _is_last_stage() else {}, self.device)

    def _reduce_over_shards(self) -> dict[str, float]:
        names = sorted(self.tokens)
        totals = torch.stack([self.tokens[name] for name in names]).to(self.device)
        distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        sums = dict(zip(names, totals.tolist(), strict=True))
        count = max(sums.pop(""), 1.0)
        losses, norms, rates = zip(*self.updates, strict=True)
        return {
            "loss": float(np.mean(losses)),
            "grad_norm": float(np.mean(norms)),
            "lr": rates[-1],
            **{name: total / count for name, total in sums.items()},
            **self._largest_gap(),
        }

    def _largest_gap(self) -> dict[str, float]:
        mine = torch.tensor(self.largest, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(parallel_state.get_data_parallel_world_size())]
        distributed.all_gather(everyone, mine, group=parallel_state.get_data_parallel_group())
        by_shard = torch.stack(everyone).cpu()
        shard = int(by_shard[:, 0].nan_to_num(nan=float("inf")).argmax())
        value, sample, position = by_shard[shard].tolist()
        return {
            "gap_max": max(value, 0.0) if value == value else value,
            "gap_shard": float(shard),
            "gap_sample": sample,
            "gap_position": position,
        }


def _placeholder(batch: Batch) -> Batch:
    """A stand-in for an empty shard: one sample of two tokens, none of them trained."""
    two = {
        "tokens": np.zeros(2, np.int32),
        "loss_mask": np.zeros(2, np.bool_),
        "rollout_logprobs": np.zeros(2, np.float32),
        "advantages": np.zeros(2, np.float32),
        "loss_weights": np.zeros(2, np.float32),
    }
    columns = {name: np.zeros(2, np.float32) for name in batch.columns}
    return replace(batch, lengths=np.array([2], np.int32), group_index=np.zeros(1, np.int32), columns=columns, **two)


def _filler() -> MicroBatch:
    """A micro-batch of no sample: two tokens, none of them wanted."""
    none = np.zeros(0, np.int64)
    return MicroBatch(np.zeros((1, 2), np.int64), none, none, none, none, none, none, none)


def _buffers(chunk: Any) -> list[Any]:
    return chunk.buffers  # Megatron's, not torch's method of that name


def _expert_buffers(chunk: Any) -> list[Any]:
    return chunk.expert_parallel_buffers


def _is_last_stage() -> bool:
    return parallel_state.is_pipeline_last_stage()


def _counts() -> bool:
    """Whether this rank stands for its shard: of the ranks that compute its loss the first."""
    return (
        _is_last_stage()
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def _from_last_stage(values: Tensor) -> Tensor:
    """What the last stage holds, on every stage; of the same shape there."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group: Any = parallel_state.get_pipeline_model_parallel_group()
        distributed.broadcast(values, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return values


def _told_by_last_stage(metrics: dict[str, float], device: torch.device) -> dict[str, float]:
    """The last stage's metrics, on every stage. Only that stage knows their names."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return metrics
    text = torch.frombuffer(bytearray(json.dumps(metrics), "ascii"), dtype=torch.uint8).to(device)
    length = _from_last_stage(torch.tensor(len(text), device=device))
    text = _from_last_stage(text if _is_last_stage() else text.new_empty(int(length)))
    return json.loads(bytes(text.cpu().numpy()))
