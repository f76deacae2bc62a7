"""Torch modules that layer specs put in place of Megatron's: they run on any device and need no extension."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from miles_train.megatron.specs.context_parallel import attend_over_ranks
from miles_train.megatron.upstream import MegatronModule, TransformerConfig, parallel_state


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that also works under sequence parallelism (Megatron's own wrapper of torch's refuses it).

    Each rank then sees part of the sequence; the mark on the weight makes `finalize_model_grads` sum its gradient.
    Zero-centred, its gain is 1 + weight, added in float32: bfloat16 would round small weights away.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        """Build it as Megatron builds norms.

        Args:
            config: brings dtype, sequence parallelism, and whether the weight is zero-centred.
            hidden_size: channels to normalise over.
            eps: added to the mean square.
        """
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]."""
        if not self.zero_centered:
            return super().forward(x)
        gain = 1 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, gain, self.eps).to(x.dtype)


class CausalAttention(MegatronModule):
    """Causal attention by `torch.nn.functional.scaled_dot_product_attention`, one fused kernel on CPU and GPU.

    Padded on the right, a token never attends to what follows it, so padding needs no mask. Packed, each segment is a
    call of its own: exact on any device, but slow for many short ones (on a GPU, Transformer Engine takes this place).
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any):
        """Build it as Megatron builds core attention.

        Args:
            config: brings the numbers of heads.
            layer_number: from 1; unused, part of Megatron's contract.
            softmax_scale: factor on the scores; None for 1 / sqrt(head_dim).
        """
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, heads, head_dim]; packed, [T, heads, head_dim].
            key: [S, B, groups, head_dim]; packed, [T, groups, head_dim].
            value: as key; its head_dim may be another.
            attention_mask: must be None: the mask is causal.
            attn_mask_type: unused, part of Megatron's contract.
            attention_bias: must be None.
            packed_seq_params: Megatron's; `cu_seqlens_q`, int32 [N + 1], says where segments begin and end.

        Returns:
            [S, B, heads * head_dim]; packed, [T, heads * head_dim].
        """
        assert attention_mask is None and attention_bias is None
        group: Any = parallel_state.get_context_parallel_group()  # annotated as an int as well
        if packed_seq_params is None and group.size() > 1:
            return attend_over_ranks(query, key, value, group, self.softmax_scale).flatten(2)
        if packed_seq_params is None:
            return self._attend(query, key, value)
        assert group.size() == 1, "packed sequences are not divided over context-parallel ranks"
        sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
        segments = zip(*(part.unsqueeze(1).split(sizes) for part in (query, key, value)), strict=True)
        return torch.cat([self._attend(*segment).squeeze(1) for segment in segments])

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def with_bias(linear: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """A builder of `linear` whose bias is `bias`, whatever Megatron's one flag for all linears says."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build
