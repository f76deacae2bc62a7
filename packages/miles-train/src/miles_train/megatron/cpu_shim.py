"""Lets megatron-core 0.19.2 run in a process without a GPU.

Megatron's layers, schedules and optimizers ask `torch.cuda` for the current device, streams and random state, and make
small tensors with `device="cuda"`, also where they were configured for the CPU. No setting turns that off: "there is no
CPU-only path in Megatron Core" (https://github.com/NVIDIA-NeMo/Speech/issues/14244); an open pull request removes some
of it for model conversion (https://github.com/NVIDIA/Megatron-LM/pull/6270). The shim answers these questions with
torch's own CPU twins, in two parts:

- `install` rebinds the attributes listed in `rebindings`, once, for the life of the process: a trainer's and no other.
- `active` is a context to call Megatron in. Within it, tensors asked for on "cuda" or in pinned memory come in the
  CPU's own, and `Tensor.type()` says "torch.cuda.FloatTensor": an assertion of Megatron's gradient clipping compares
  that name.
  `paused` lifts both while somebody else's code (a loss, a hook) runs inside.

The names hold for one version, so every other version is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import distributed
from torch.overrides import TorchFunctionMode

from miles_train.megatron.settings import TESTED_VERSION
from miles_train.megatron.upstream import (
    MEGATRON_VERSION,
    tensor_parallel_mappings,
    tensor_parallel_random,
    token_dispatcher,
    training_arguments,
)


@dataclass(frozen=True, slots=True)
class Rebinding:
    """One attribute that the shim replaces.

    Attributes:
        owner: the module or class whose attribute it is.
        name: the attribute.
        value: what it becomes.
        why: who asks for it.
    """

    owner: ModuleType | type
    name: str
    value: Any
    why: str


def rebindings() -> tuple[Rebinding, ...]:
    """Everything that `install` replaces, and why."""
    cuda, cpu, dispatcher = torch.cuda, torch.cpu, token_dispatcher.MoEAlltoAllTokenDispatcher
    return (
        Rebinding(cuda, "current_device", cpu.current_device, "devices of buffers, rotary embedding, optimizer state"),
        Rebinding(cuda, "synchronize", cpu.synchronize, "the checkpoint writer, after staging tensors"),
        Rebinding(cuda, "current_stream", cpu.current_stream, "gradient buckets before a reduction"),
        Rebinding(cuda, "get_rng_state", _get_rng_state, "the tracker of model-parallel random states"),
        Rebinding(cuda, "set_rng_state", _set_rng_state, "loading it from a checkpoint"),
        Rebinding(cuda, "manual_seed", torch.manual_seed, "seeding that tracker"),
        Rebinding(tensor_parallel_random, "_get_cuda_rng_state", _get_rng_state, "forking that tracker"),
        Rebinding(tensor_parallel_random, "_set_cuda_rng_state", _set_rng_state, "forking that tracker"),
        Rebinding(
            training_arguments, "get_device_arch_version", _blackwell, "a rule on the launch queues of older GPUs"
        ),
        Rebinding(dispatcher, "cuda_dtoh_stream", _NO_STREAM, "made where there is none; used by the next alone"),
        Rebinding(dispatcher, "_maybe_dtoh_and_synchronize", _to_host, "counts of tokens before an all-to-all"),
        Rebinding(tensor_parallel_mappings, "_gather_along_first_dim", _gather, "gloo gathers equal parts alone"),
        Rebinding(tensor_parallel_mappings, "_reduce_scatter_along_first_dim", _reduce_scatter, "as above"),
    )


def _get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(new_state)


_NO_STREAM = object()


def _blackwell() -> int:
    return 10


def _to_host(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
    """Give the counts the type that they have behind a copy to the host; they are there already."""
    if point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            counts = getattr(self, name)
            if isinstance(counts, torch.Tensor):
                setattr(self, name, counts.numpy())
    return tokens_per_expert


_stock_gather = tensor_parallel_mappings._gather_along_first_dim
_stock_reduce_scatter = tensor_parallel_mappings._reduce_scatter_along_first_dim


def _gather(
    input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """Megatron's, and of unequal parts (tokens of experts) by an all-to-all, which gloo has for those too."""
    if output_split_sizes is None or group.size() == 1:
        return _stock_gather(input_, group, output_split_sizes, use_global_buffer)
    gathered = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
    copies = input_.repeat(group.size(), *[1] * (input_.dim() - 1))
    distributed.all_to_all_single(gathered, copies, output_split_sizes, [len(input_)] * group.size(), group=group)
    return gathered


def _reduce_scatter(
    input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """Megatron's, and of unequal parts as in `_gather`."""
    if input_split_sizes is None or group.size() == 1:
        return _stock_reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
    own = input_split_sizes[group.rank()]
    parts = input_.new_empty(group.size(), own, *input_.shape[1:])
    distributed.all_to_all_single(
        parts.flatten(0, 1), input_.contiguous(), [own] * group.size(), input_split_sizes, group=group
    )
    return parts.sum(0)


def install() -> None:
    """Rebind what `rebindings` lists; does nothing the second time.

    Raises:
        RuntimeError: megatron-core is not the version that the shim was tested with.
    """
    if MEGATRON_VERSION != TESTED_VERSION:
        raise RuntimeError(
            f"megatron-core = {MEGATRON_VERSION}: the CPU shim was tested with {TESTED_VERSION} and refuses others. "
            f'Install it: pip install "megatron-core=={TESTED_VERSION}", or train on a GPU.'
        )
    for rebinding in rebindings():
        setattr(rebinding.owner, rebinding.name, rebinding.value)


class _CudaMeansCpu(TorchFunctionMode):
    """Sends what Megatron makes on "cuda" to the CPU."""

    paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Every torch call inside `active` passes here, some 500 a step: the common case must stay three tests long.
        if not self.paused:
            if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": "cpu"}
            elif kwargs and kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            elif func is torch.Tensor.cuda:
                return args[0]
            elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.", 1)
            elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
                args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


_mode = _CudaMeansCpu()


def active() -> AbstractContextManager[Any]:
    """A context to call Megatron in; nothing where there is a GPU. Per thread, and may be entered again inside."""
    return nullcontext() if torch.cuda.is_available() else _mode


@contextmanager
def paused() -> Iterator[None]:
    """A context to call others' code in, inside `active`."""
    before, _mode.paused = _mode.paused, True
    try:
        yield
    finally:
        _mode.paused = before
