"""`MegatronTrainer`: one rank of a trainer, as plain Python."""

import argparse
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from miles_core.algorithms.losses import Loss
from miles_core.hooks import AfterModelInit, AfterTrainStep, BeforeLogprobs, BeforeTrainStep
from miles_core.types import Batch, Floats
from miles_train.export import MAX_SHARD_BYTES
from miles_train.megatron import cpu_shim, optimizer_order, resume_fixes, runtime
from miles_train.megatron._environment import quietly
from miles_train.megatron.arguments import parse_arguments
from miles_train.megatron.checkpoint import Checkpoints
from miles_train.megatron.families import family_of
from miles_train.megatron.gradients import gather_gradients, gradient_of
from miles_train.megatron.layout import check_layout
from miles_train.megatron.model_weights import ModelWeights
from miles_train.megatron.packing import decide_packing
from miles_train.megatron.runtime import Address
from miles_train.megatron.settings import check_settings
from miles_train.megatron.specs import build_chunks
from miles_train.megatron.specs.backend import TRANSFORMER_ENGINE
from miles_train.megatron.step import Learner
from miles_train.megatron.upstream import (
    DistributedDataParallel,
    DistributedOptimizer,
    Float16Module,
    MegatronOptimizer,
    OptimizerParamScheduler,
    finalize_model_grads,
    get_megatron_ddp_config,
    get_megatron_optimizer,
    get_megatron_optimizer_config,
    parallel_state,
)
from miles_train.megatron.weights import WeightTable
from miles_train.megatron.weights.load import Decode, Progress, Source, keep_float32
from miles_train.megatron.weights.names import local_tensors
from miles_train.megatron.weights.pieces import Piece
from miles_train.model_dir import open_model_directory


@dataclass(frozen=True, slots=True)
class Hooks:
    """User code called in every trainer process; see `miles_core.hooks`.

    Attributes:
        after_model_init: once the model has its weights.
        before_logprobs: before old logprobs are computed in a pass of their own, as steps of several updates need.
        before_train_step: before the first update of a step.
        after_train_step: after the last one.
    """

    after_model_init: AfterModelInit | None = None
    before_logprobs: BeforeLogprobs | None = None
    before_train_step: BeforeTrainStep | None = None
    after_train_step: AfterTrainStep | None = None


class MegatronTrainer:
    """A data-parallel rank that learns from batches with stock Megatron-Core.

    Every method is collective: all ranks call it, in the same order. The process belongs to the trainer: it owns the
    default process group, and without a GPU the CPU shim is installed in it.
    """

    def __init__(
        self,
        model_path: str | Path,
        megatron: Mapping[str, Any],
        loss: Loss,
        *,
        address: Address | None = None,
        seed: int = 0,
        micro_batch_tokens: int = 16384,
        packed: bool | None = None,
        temperature: float = 1.0,
        deterministic: bool = False,
        hooks: Hooks | None = None,
        family: str | None = None,
        decode: Decode | None = None,
        progress: Progress | None = None,
    ):
        """Check everything, meet the other ranks, build the model and load its weights.

        Args:
            model_path: a Hugging Face model directory.
            megatron: `[train.megatron]`: Megatron's own argument names.
            loss: per-token loss.
            address: which rank this is and where they meet; by default the only one.
            seed: of all random states.
            micro_batch_tokens: most tokens of one forward pass, padding included.
            packed: whether a forward pass takes its samples as one row, so that no padding is computed; None does so
                where the model can and Transformer Engine attends to packed rows.
            temperature: of the sampling engine; logits are divided by it.
            deterministic: refuse operations whose result depends on timing.
            hooks: user code.
            family: "package.module:name" of a `families.Family` from elsewhere; None for those of this package.
            decode: makes numbers of FP8 weights with block scales: [N, K] e4m3 and one float32 factor for each block
                to [N, K]. Needed where the directory holds such.
            progress: told how many bytes of this rank's weights are loaded, and of how many.

        Raises:
            InputError: a setting, or the model directory, is wrong; nothing was started.
            RuntimeError: the process has a default process group, or this version of Megatron is not the tested one.
        """
        address = address or Address()
        directory = open_model_directory(model_path)
        predicts_more = "mtp_loss_scaling_factor" in megatron
        table, spec = family_of(directory, family, predicts_more=predicts_more)
        source = Source(directory, decode)
        self._device = runtime.device_of_this_process()
        on_gpu = self._device.type == "cuda"
        check_settings(megatron)
        layout = check_layout(megatron, address.world_size, directory.config)
        if not on_gpu:
            cpu_shim.install()
        args = parse_arguments(
            megatron,
            spec.arguments(directory.config),
            rank=address.rank,
            layout=layout,
            seed=seed,
            on_gpu=on_gpu,
        )
        runtime.start(args, address, deterministic=deterministic)
        self.shard, self.num_shards = layout.shard_of(address.rank), layout.num_shards
        self._hooks = hooks or Hooks()
        self._directory, self._table, self._args = directory, table, args
        with cpu_shim.active(), quietly():
            self._cores = build_chunks(spec, directory.config, args)
            self._weights = ModelWeights(self._cores, table, source)
            chunks = [_with_gradient_buffers(core.to(self._device), args, table) for core in self._cores]
            self._weights.load(progress)
            optimizer, scheduler = _optimizer(args, chunks)
        self._checkpoints = Checkpoints(self._cores, optimizer, scheduler)
        chunks[0].config.finalize_model_grads_func = _finalize_gradients
        self._learner = Learner(
            chunks,
            optimizer,
            scheduler,
            loss,
            vocab_size=args.vocab_size,
            micro_batch_tokens=micro_batch_tokens,
            temperature=temperature,
            device=self._device,
            packed=decide_packing(
                packed,
                chunks,
                by_default=args.transformer_impl == TRANSFORMER_ENGINE,
                context_parallel=layout.context,
            ),
        )
        if self._hooks.after_model_init:
            self._hooks.after_model_init(chunks)

    def step(self, minibatches: Sequence[Batch]) -> dict[str, float]:
        """Update the weights once per minibatch.

        Args:
            minibatches: this rank's shard of each; every rank brings equally many. A shard may be empty.

        Returns:
            Metrics, equal on all ranks: `loss`, `grad_norm`, `lr`, `entropy`, `logprob_gap`, `k3_kl`, `gap_max`,
            `gap_shard`, `gap_sample`, `gap_position`, and what the loss reported (see `step._Sums.reduce`).

        Raises:
            NonFiniteError: a loss or gradient is not finite; raised on all ranks before that update.
            CheckpointError: an asynchronous save failed; raised on all ranks before the first update.
        """
        self._checkpoints.poll()
        hooks = self._hooks
        if hooks.before_logprobs and len(minibatches) > 1:
            hooks.before_logprobs(_whole_step(minibatches))
        if hooks.before_train_step:
            hooks.before_train_step(_whole_step(minibatches))
        metrics = self._learner.step(minibatches)
        if hooks.after_train_step:
            hooks.after_train_step(metrics)
        return metrics

    def logprobs(self, batch: Batch) -> Floats:
        """Log probability of every token under the current weights, float32 [T]; 0 for the first of each sample."""
        return self._learner.logprobs(batch, all_tokens=True).cpu().numpy().astype(np.float32)

    def logits(self, batch: Batch) -> Floats:
        """Logits that predict each token under the current weights, float32 [T, V]; 0 for the first of each sample.

        For tests of a model: every rank of a copy of it must be given the same samples, and gets all logits.
        """
        return self._learner.logits(batch).cpu().numpy()

    def gradients(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradient that `step` would update by, under Hugging Face names; nothing is updated.

        For tests of a model. All ranks must take all tensors, in step: every tensor goes to every rank.

        Args:
            batch: this rank's shard, as for `step`.

        Yields:
            Name and gradient, of the whole tensor's shape, float32; zeros for what takes none.
        """
        self._learner.backward(batch)
        with cpu_shim.active():
            gather_gradients(self._learner.chunks)
            yield from self._weights.gathered(
                {name: gradient_of(tensor) for name, tensor in local_tensors(self._cores)}, self._device
            )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight under its Hugging Face name, as the model directory names them.

        Where every rank holds the whole model, many are views of live parameters in their dtype, on their device: copy
        what must outlive the next step. Else every tensor is gathered to every rank, one at a time, and all ranks must
        take all of them: the slow way, see `pieces`.
        """
        return self._weights.whole(self._device)

    def pieces(self) -> Iterator[Piece]:
        """Yield the parts of weights that this rank holds, with their place in the whole; nothing is gathered.

        Collective when it is called first, and never again. As with `weights`, copy what must outlive the next step.
        """
        return self._weights.pieces()

    def save(
        self, path: str | Path, state: Mapping[str, Any], *, keep: int | None = None, asynchronous: bool = False
    ) -> None:
        """Write a checkpoint: model, optimizer, schedule, random states, and `state`. Any layout of ranks can load it.

        Args:
            path: folder to write, the same on all ranks. `latest` beside it then names it. What is there is replaced,
                but never the checkpoint that `latest` names.
            state: the caller's own, JSON-able (weight version, data cursor). Rank 0's is written.
            keep: how many of the newest checkpoints beside it to keep; None keeps all.
            asynchronous: return once everything is copied to the host's memory, and write it while training goes on.
                Later calls finish it: every `step`, and `save`, `load`, `finish_saving` and `close` wait for it.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched. Of an asynchronous save the call
                that finishes it raises this.
        """
        self._checkpoints.save(Path(path), state, keep, asynchronous=asynchronous)

    def finish_saving(self) -> None:
        """Wait for an asynchronous save.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        self._checkpoints.wait()

    def load(self, path: str | Path) -> dict[str, Any]:
        """Continue from a checkpoint.

        Args:
            path: its folder, or the folder whose `latest` names it.

        Returns:
            The state given to `save`.

        Raises:
            CheckpointError: there is none, it is damaged, or it does not fit.
        """
        return self._checkpoints.load(Path(path))

    def export(self, path: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write a Hugging Face directory: the weights in the parameters' dtype, config.json and the tokenizer's files.

        Every rank writes files of its own, tensor by tensor; each is read back from the disk.

        Args:
            path: directory to make, the same on all ranks, on a disk that all of them see. An older export there is
                replaced.
            max_shard_bytes: a file is closed before it grows beyond this.

        Raises:
            CheckpointError: it could not be written, or did not read back bit for bit; nothing is at `path` then.
        """
        self._weights.export(Path(path), max_shard_bytes=max_shard_bytes)

    def close(self) -> None:
        """Finish an asynchronous save, leave the process group and give memory back. No method may be called again."""
        try:
            self._checkpoints.wait()
        finally:
            runtime.stop()
            # The model, its optimizer and the groups refer to each other: left to chance, threads of closed groups and
            # the GPU's memory would stay taken in a process that goes on to build another trainer. One circle no
            # collector sees, for it goes through autograd's graph: the buffers' hooks on it, their model, and what
            # experts' dispatchers keep of the last forward pass. It is cut at the buffers.
            for chunk in self._learner.chunks:
                vars(chunk).clear()
            vars(self).clear()
            gc.collect()


def _whole_step(minibatches: Sequence[Batch]) -> Batch:
    """The rank's shard of the step, as hooks see it."""
    if len(minibatches) == 1:
        return minibatches[0]
    whole: dict[str, Any] = {}
    for field in dataclasses.fields(Batch):
        parts = [getattr(batch, field.name) for batch in minibatches]
        match parts[0]:
            case int():
                whole[field.name] = sum(parts)
            case Mapping() as columns:
                whole[field.name] = {name: np.concatenate([part[name] for part in parts]) for name in columns}
            case _:
                whole[field.name] = np.concatenate(parts)
    return Batch(**whole)


def _with_gradient_buffers(core: Any, args: argparse.Namespace, table: WeightTable) -> DistributedDataParallel:
    """A chunk in Megatron's buffers, laid out for the optimizer that will read them."""
    model = Float16Module(core.config, core) if args.bf16 else core
    keep_float32([core], table)
    config = get_megatron_ddp_config(args)
    layout = None
    if config.use_distributed_optimizer:
        layout = DistributedOptimizer.compute_full_param_layout(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            None,  # one bucket: nothing is overlapped
            parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            config,
            parallel_state.get_expert_data_parallel_world_size(),
        )
    return DistributedDataParallel(core.config, config, model, full_param_layout=layout)


def _optimizer(
    args: argparse.Namespace, chunks: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Megatron's optimizer and its schedule, which counts optimizer updates."""
    made: Any = get_megatron_optimizer_config(args)  # annotated upstream as the first of the two alone
    config, overrides = made
    optimizer = get_megatron_optimizer(config, list(chunks), overrides, use_gloo_process_groups=False)
    optimizer_order.number_as_stored(optimizer)
    resume_fixes.allocate_state(optimizer)
    warm_up = args.lr_warmup_iters
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warm_up,
        # A constant schedule reads it for nothing but an assertion.
        lr_decay_steps=args.lr_decay_iters or warm_up + 1,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=args.lr_decay_iters or warm_up + 1,
        wd_incr_style=args.weight_decay_incr_style,
        wsd_decay_steps=args.lr_wsd_decay_iters,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
    return optimizer, scheduler


def _finalize_gradients(model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Sum gradients over ranks and divide by nothing: loss_weights sum to 1 over the whole step."""
    finalize_model_grads(model, None, **kwargs)
