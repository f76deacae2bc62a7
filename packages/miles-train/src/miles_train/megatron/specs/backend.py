"""Which modules a layer is made of: Megatron's `BackendSpecProvider`, with ours where stock ones need a GPU or refuse.

Both backends keep layer norms apart from the linears that follow them, so that a parameter has one name everywhere.
(Transformer Engine's fused norm and linear is the same two kernels in bfloat16: it saves a call, not a pass.)
"""

import logging
from typing import Any

from torch import nn

from miles_train.megatron.specs.modules import CausalAttention, RMSNorm
from miles_train.megatron.upstream import (
    HAVE_TRANSFORMER_ENGINE,
    BackendSpecProvider,
    LocalSpecProvider,
    TESpecProvider,
    TransformerConfig,
)

__all__ = ["BackendSpecProvider", "LocalBackend", "TEBackend", "backend_of", "choose_implementation", "settle"]

_logger = logging.getLogger(__name__)

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"


class LocalBackend(LocalSpecProvider):
    """Megatron's own linears, torch's norm and attention: runs on any device and needs no extension."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """RMSNorm that also works under sequence parallelism."""
        return RMSNorm

    def core_attention(self) -> type:
        """Causal attention by torch."""
        return CausalAttention


class TEBackend(TESpecProvider):
    """Transformer Engine: linears, norms, grouped experts, and attention over padded or packed sequences; GPUs only."""

    def fuse_layernorm_and_linear(self) -> bool:
        """Never: see the module's docstring."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """None: see the module's docstring."""
        return None


def choose_implementation(*, on_gpu: bool, bf16: bool) -> tuple[str, str]:
    """Megatron's `transformer_impl` where none was asked for, and the reason.

    Args:
        on_gpu: where the model lives.
        bf16: whether its parameters are bfloat16.
    """
    if not on_gpu:
        return LOCAL, "there is no GPU"
    if not bf16:
        return LOCAL, "bf16 is not set, and Transformer Engine's attention kernels do not compute in float32"
    if not HAVE_TRANSFORMER_ENGINE:
        return LOCAL, 'Transformer Engine cannot be imported: pip install "miles-train[te]"'
    return TRANSFORMER_ENGINE, "a GPU, bfloat16 and Transformer Engine are there"


def backend_of(implementation: str) -> BackendSpecProvider:
    """The backend that `transformer_impl` names."""
    return TEBackend() if implementation == TRANSFORMER_ENGINE else LocalBackend()


def settle(model: nn.Module, transformer: TransformerConfig) -> None:
    """Last touches to a model of Transformer Engine's modules.

    - Its linears add a weight's gradient to the float32 buffer within the product that computes it. Megatron's switch
      for that, `gradient_accumulation_fusion`, cannot be used: the output layer, which is Megatron's own, then refuses
      to be built without Apex. They always add, also in a step's first micro-batch: a module that runs twice in it (a
      layer that predicts several tokens) would otherwise overwrite, in the backward pass of its first run, what that
      of its second had added.
    - Fused rotary embedding leaves out the factor on sine and cosine that YaRN and LongRoPE have, without a word
      (megatron/core/models/common/embeddings/rope_utils.py, 0.19.2): models with one do without the fusion.

    Args:
        model: before it lies in gradient buffers.
        transformer: the configuration that all its modules share.
    """
    if transformer.transformer_impl != TRANSFORMER_ENGINE:
        return
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # pyright: ignore[reportArgumentType]
            # "First micro-batch" is then never said; it otherwise serves FP8 weights alone.
            module.disable_parameter_transpose_cache = True  # pyright: ignore[reportArgumentType]
        if getattr(module, "_yarn_concentration_factor", 1.0) != 1.0 and transformer.apply_rope_fusion:
            _logger.info("rotary embedding is not fused: it has a factor on sine and cosine")
            transformer.apply_rope_fusion = False
