"""Which modules a layer is made of: Megatron's `BackendSpecProvider`, with ours where stock ones need a GPU or refuse.

Both backends keep layer norms apart from the linears that follow them, so that a parameter has one name everywhere.
"""

from typing import Any

from miles_train.megatron.specs.modules import CausalAttention, RMSNorm
from miles_train.megatron.upstream import BackendSpecProvider, LocalSpecProvider

__all__ = ["BackendSpecProvider", "LocalBackend"]


class LocalBackend(LocalSpecProvider):
    """Megatron's own linears, torch's norm and attention: runs on any device and needs no extension."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """RMSNorm that also works under sequence parallelism."""
        return RMSNorm

    def core_attention(self) -> type:
        """Causal attention by torch."""
        return CausalAttention
