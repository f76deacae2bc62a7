"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) on Megatron's base class.

Megatron's `MLASelfAttention` is not used: it has no biases, one epsilon for all norms, a fixed rotary layout and its
own frequencies, and without Transformer Engine it cuts the down-projections over tensor-parallel ranks, so that the
rotary part of the keys gets the gradient of one rank's heads alone. The base class brings the forward pass, the softmax
scale, core attention and the output projection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_core.errors import InputError
from miles_train.megatron import zigzag
from miles_train.megatron.rope import Rope
from miles_train.megatron.upstream import (
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """How the rotary channels of queries and keys are turned.

    Attributes:
        rope: the frequencies.
        interleaved: whether the two channels of a pair are neighbours; else they lie half of all apart. Either way the
            turned channels come out as halves, which scores do not notice.
    """

    rope: Rope
    interleaved: bool

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for positions [T], each [T, dim / 2].

        Raises:
            InputError: a position beyond those that the frequencies hold for.
        """
        longest = self.rope.max_length
        if longest is not None and int(positions.max()) >= longest:
            raise InputError(
                "sequence length",
                int(positions.max()) + 1,
                f"must be at most {longest}: beyond it a rotary embedding of kind {self.rope.kind!r} is another one",
                "Train on shorter sequences.",
            )
        angles = positions.float()[:, None] * self.rope.inverse_frequencies().to(positions.device)
        scale = self.rope.attention_factor
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def turn(self, channels: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the pairs of [T, ..., dim] by the cosine and sine of T positions."""
        cos, sin = (part.view(len(part), *[1] * (channels.dim() - 2), -1) for part in angles)
        first, second = (channels[..., 0::2], channels[..., 1::2]) if self.interleaved else channels.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def sequence_starts(length: int, packed_seq_params: Any, device: torch.device) -> Tensor:
    """Where sequences start, and `length` behind the last: one sequence, or several packed behind each other."""
    if packed_seq_params is None:
        return torch.tensor([0, length], device=device)
    padded = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def _positions(length: int, packed_seq_params: Any, group: Any, device: torch.device) -> Tensor:
    """Positions in their sequences of a context-parallel rank's tokens, int64 [length]."""
    if group.size() > 1:
        assert packed_seq_params is None, "packed sequences are not divided over context-parallel ranks"
        return zigzag.positions(length * group.size(), group.rank(), group.size(), device)
    starts = sequence_starts(length, packed_seq_params, device)
    return torch.arange(length, device=device) - starts[:-1].repeat_interleave(starts.diff(), output_size=length)


class ReplicatedLinear(torch.nn.Linear):
    """A linear that every tensor-parallel rank holds whole.

    Under sequence parallelism each rank sees part of the sequence; the mark makes `finalize_model_grads` sum gradients.
    """

    def __init__(self, in_features: int, out_features: int, *, config: TransformerConfig, bias: bool):
        """Build it.

        Args:
            in_features: channels in.
            out_features: channels out.
            config: brings dtype and sequence parallelism.
            bias: whether it has one.
        """
        super().__init__(in_features, out_features, bias=bias, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


class LatentAttention(MultiLatentAttention):
    """Queries and keys with a content part and a rotary part, the latter of the keys shared by all heads.

    Parameters are named as in `MLASelfAttention`. The low-rank down-projections and their norms are whole on every
    tensor-parallel rank, heads are cut.
    """

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        *,
        rotation: Rotation,
        bias: bool,
        norm_eps: float,
        **kwargs: Any,
    ):
        """Build it.

        Args:
            config: Megatron's, with the sizes of latent attention; no query rank means that queries are projected at
                once.
            submodules: linears, norms and core attention.
            layer_number: from 1.
            rotation: of the rotary channels.
            bias: whether the down-projections have biases.
            norm_eps: epsilon of the norms of the latent vectors.
            kwargs: for `MultiLatentAttention`.
        """
        super().__init__(config, submodules, layer_number, attention_type="self", **kwargs)
        del self.rotary_pos_emb  # knows two scalings of its own; `rotation` takes its place
        self.rotation = rotation
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.kv_parts = [config.kv_lora_rank, config.qk_pos_emb_head_dim]

        def norm(size: int) -> Any:
            return submodules.kv_layernorm(config=config, hidden_size=size, eps=norm_eps)

        def up(linear: Any, size: int, head_size: int) -> Any:
            return _heads(linear, size, heads * head_size, config, self.tp_group)

        if config.q_lora_rank is None:
            self.linear_q_proj = up(submodules.linear_q_proj, hidden, self.q_head_dim)
        else:
            self.linear_q_down_proj = ReplicatedLinear(hidden, config.q_lora_rank, config=config, bias=bias)
            self.q_layernorm = norm(config.q_lora_rank)
            self.linear_q_up_proj = up(submodules.linear_q_up_proj, config.q_lora_rank, self.q_head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(hidden, sum(self.kv_parts), config=config, bias=bias)
        self.kv_layernorm = norm(config.kv_lora_rank)
        kv_head = config.qk_head_dim + config.v_head_dim
        self.linear_kv_up_proj = up(submodules.linear_kv_up_proj, config.kv_lora_rank, kv_head)

    def get_query_key_value_tensors(  # pyright: ignore[reportIncompatibleMethodOverride]  # latent attention's own
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        inference_context: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Project, norm and rotate.

        Args:
            hidden_states: [S, B, hidden]; with sequence parallelism this rank's part of the sequence.
            key_value_states: must be None: it is self-attention.
            position_ids: unused: tokens stand in order.
            packed_seq_params: where sequences end, if B = 1 row holds several.
            inference_context: must be None.

        Returns:
            Query, key and value of this rank's heads, [S, B, heads, channels], or [S, heads, channels] where sequences
            are packed; then what the queries were made of and the latent of the keys, as they entered.
        """
        assert key_value_states is None and inference_context is None
        latent_q = hidden_states
        if self.config.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            latent_q = self.q_layernorm(self.linear_q_down_proj(hidden_states))
            query, _ = self.linear_q_up_proj(latent_q)
        latent_kv, key_rotary = self.linear_kv_down_proj(hidden_states).split(self.kv_parts, dim=-1)
        latent_kv = self.kv_layernorm(latent_kv)
        key_value, _ = self.linear_kv_up_proj(latent_kv)
        return *self._turned(query, key_value, self._for_my_heads(key_rotary), packed_seq_params), latent_q, latent_kv

    def _turned(
        self, query: Tensor, key_value: Tensor, key_rotary: Tensor, packed_seq_params: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.num_attention_heads_per_partition
        content = self.config.qk_head_dim
        angles = self.rotation.angles(
            _positions(len(query), packed_seq_params, self.pg_collection.cp, query.device), query.dtype
        )
        query_content, query_rotary = query.unflatten(-1, (heads, -1)).tensor_split([content], dim=-1)
        key_content, value = key_value.unflatten(-1, (heads, -1)).tensor_split([content], dim=-1)
        key_rotary = self.rotation.turn(key_rotary.unsqueeze(-2), angles).expand(-1, -1, heads, -1)
        query = torch.cat([query_content, self.rotation.turn(query_rotary, angles)], dim=-1)
        key = torch.cat([key_content, key_rotary], dim=-1)
        if packed_seq_params is not None:
            query, key, value = (part.squeeze(1) for part in (query, key, value))
        return query, key, value

    def _for_my_heads(self, shared: Tensor) -> Tensor:
        """A part that all heads use, whole; its gradient is summed over the ranks that hold them."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(shared.contiguous(), group=self.tp_group)
        return copy_to_tensor_model_parallel_region(shared, group=self.tp_group)


def _heads(linear: Callable[..., Any], in_features: int, out_features: int, config: Any, tp_group: Any) -> Any:
    return linear(
        in_features,
        out_features,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=False,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
    )
