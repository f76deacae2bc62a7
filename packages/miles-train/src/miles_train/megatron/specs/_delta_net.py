"""Gated DeltaNet: Megatron's own `GatedDeltaNet`, made to run without flash-linear-attention and to learn as trained.

What stock megatron-core 0.19.2 (megatron/core/ssm/gated_delta_net) lacks, and where this module adds it:

- it refuses to be built without flash-linear-attention, which needs a GPU, and cannot train with it under Triton 3.4
  to 3.7.0 on Hopper: `use_torch_kernels` then puts the functions of `delta_rule` in place of that package's names;
- the decay is computed from A_log in the model's dtype, in transformers in float32: `GatedDeltaNet` keeps A_log and
  dt_bias in float32;
- the gain of the output norm is the same for all heads, but under tensor parallelism without sequence parallelism the
  gradients that each rank's heads give it are never summed: `HeadNorm` sums them;
- with zero-centred layer norms (gain 1 + weight) the output norm would be one too; Qwen's is not: `HeadNorm` never is.

Sequences are right-padded or packed. Nothing flows from a token to those before it, so padding on the right changes no
token; packed sequences are kept apart by their bounds.
"""

import logging
import re
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from miles_train.megatron import delta_rule
from miles_train.megatron.settings import TESTED_VERSION
from miles_train.megatron.specs.backend import BackendSpecProvider
from miles_train.megatron.upstream import (
    MEGATRON_VERSION,
    GatedDeltaNetSubmodules,
    ModuleSpec,
    StockGatedDeltaNet,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gated_delta_net,
    gated_delta_net_common,
)

_logger = logging.getLogger(__name__)


def delta_net(backend: BackendSpecProvider) -> ModuleSpec:
    """The layer's spec; sizes come from Megatron's `linear_*` arguments.

    Raises:
        RuntimeError: flash-linear-attention cannot be used and megatron-core is not the version whose names are known.
    """
    reason = _why_torch()
    if reason is not None:
        use_torch_kernels(reason)
    submodules = GatedDeltaNetSubmodules(
        in_proj=backend.column_parallel_linear(),
        out_norm=HeadNorm,
        out_proj=backend.row_parallel_linear(),
    )
    return ModuleSpec(module=GatedDeltaNet, submodules=submodules)


def torch_kernels() -> tuple[tuple[ModuleType, str, Any], ...]:
    """What `use_torch_kernels` replaces: module, name, and the function that takes the place of the missing one."""
    return (
        (gated_delta_net_common, "HAVE_FLA", True),
        (gated_delta_net_common, "l2norm", delta_rule.l2norm),
        (gated_delta_net, "causal_conv1d", delta_rule.causal_conv1d),
        (gated_delta_net, "chunk_gated_delta_rule", delta_rule.chunk_gated_delta_rule),
    )


def _why_torch() -> str | None:
    """What speaks against flash-linear-attention's kernels here; None if they can be used."""
    if not gated_delta_net_common.HAVE_FLA:
        return "flash-linear-attention is missing"
    if not torch.cuda.is_available():
        return "there is no GPU"
    # https://github.com/fla-org/flash-linear-attention/issues/640; version 0.6.0 raises in the backward pass.
    found = version("triton")
    release = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if torch.cuda.get_device_capability()[0] == 9 and (3, 4, 0) <= release < (3, 7, 1):
        return f"Triton {found} miscompiles the backward pass of flash-linear-attention on Hopper (3.7.1 does not)"
    return None


def use_torch_kernels(reason: str) -> None:
    """Let Megatron's GatedDeltaNet compute with plain torch, for the life of the process.

    Args:
        reason: why not with flash-linear-attention; told where there is a GPU.

    Raises:
        RuntimeError: megatron-core is not the version that this was tested with.
    """
    if MEGATRON_VERSION != TESTED_VERSION:
        raise RuntimeError(
            f"megatron-core = {MEGATRON_VERSION}: linear attention without flash-linear-attention was tested with "
            f'{TESTED_VERSION} alone. Install that version, or pip install "flash-linear-attention" on a GPU.'
        )
    for module, name, value in torch_kernels():
        setattr(module, name, value)
    if torch.cuda.is_available():
        _logger.warning("%s: linear attention runs in plain torch, several times slower", reason)


class GatedDeltaNet(StockGatedDeltaNet):
    """Megatron's, with A_log and dt_bias in float32 whatever the model's dtype."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Build it as Megatron builds attention."""
        super().__init__(*args, **kwargs)
        for parameter in (self.A_log, self.dt_bias):
            parameter.data = parameter.data.float()

    def _compute_g_and_beta(
        self, A_log_local_cp: Tensor, dt_bias_local_cp: Tensor, alpha: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        decay = -A_log_local_cp.float().exp() * functional.softplus(alpha.float() + dt_bias_local_cp.float())
        return decay, beta.sigmoid()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GatedDeltaNet":
        """Move the two parameters with the module, but never cast them: a model in bfloat16 keeps them in float32."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse=False)
        return self


class HeadNorm(torch.nn.Module):
    """RMSNorm over the channels of one head, its gain shared by all heads of all tensor-parallel ranks.

    Each rank has its own heads, so each one's gradient of the gain is a part of the whole.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        """Build it as Megatron builds norms.

        Args:
            config: brings dtype.
            hidden_size: channels of a head.
            eps: added to the mean square.
        """
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]."""
        gain = copy_to_tensor_model_parallel_region(self.weight)  # its backward pass sums over the ranks
        return functional.rms_norm(x, self.weight.shape, gain, self.eps)
