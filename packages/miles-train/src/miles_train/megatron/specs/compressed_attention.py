"""Attention of DeepSeek-V4: one key-value head, a sliding window, and behind it entries compressed from many tokens.

Follows transformers/models/deepseek_v4/modeling_deepseek_v4.py. Legend: B batch, S tokens, E compressed entries,
H query heads of this rank, D channels of a head, R rotated channels (the last of D), Q query rank.

Under tensor parallelism query heads, sinks and output groups are split. Keys, values and compressed entries are
computed on every rank alike, from the whole sequence: gradients that reach them are summed over ranks once, where a
replicated tensor enters a rank's own heads, and are then the same everywhere.

The whole matrix of scores is held, [B, H, S, S + E]: meant for the lengths of this package's tests, and on a GPU for
sequences of a few thousand tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from miles_train.megatron.deepseek_v4_config import SLIDING, SPARSE, V4Config
from miles_train.megatron.specs.hyper_connections import unit_rms
from miles_train.megatron.specs.modules import RMSNorm
from miles_train.megatron.upstream import (
    MegatronModule,
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

_SPLIT = {"q_b_proj": 0, "sinks": 0, "o_a_proj": 0, "o_b_proj": 1}  # parameter to the dim that ranks share


class Rotary:
    """Rotates neighbouring pairs of the last channels."""

    def __init__(self, inverse_frequencies: Tensor, factor: float):
        """Keep the angles per token of each pair, float32 [R / 2], and the factor on cos and sin."""
        self.inverse_frequencies, self.factor = inverse_frequencies, factor

    def __call__(self, x: Tensor, positions: Tensor, *, undo: bool = False) -> Tensor:
        """Rotate.

        Args:
            x: [B, T, heads, D].
            positions: of the T entries, int [T].
            undo: rotate back instead.
        """
        angles = positions[:, None].float() * self.inverse_frequencies.to(x.device)
        cos, sin = angles.cos()[:, None] * self.factor, angles.sin()[:, None] * self.factor
        num_rotated = 2 * len(self.inverse_frequencies)
        still, moving = x[..., :-num_rotated], x[..., -num_rotated:].float().unflatten(-1, (-1, 2))
        first, second = moving.unbind(-1)
        sin = -sin if undo else sin
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        return torch.cat((still, rotated.to(x.dtype)), -1)


class Compressor(nn.Module):
    """Makes one entry of every `rate` tokens: their projections' sum, weighted by a softmax over learned gates.

    Where windows overlap, the projections are twice as wide: the first half goes to the next window's entry, the second
    to its own. A last window that is not full makes no entry.
    """

    def __init__(self, config: TransformerConfig, rate: int, dim: int, *, overlaps: bool):
        """Build it, uninitialised.

        Args:
            config: brings the width of the residual stream.
            rate: tokens of a window.
            dim: channels of an entry.
            overlaps: whether an entry also sees the window before its own.
        """
        super().__init__()
        self.rate, self.overlaps = rate, overlaps
        width = 2 * dim if overlaps else dim
        self.kv_proj = _linear(config, config.hidden_size, width)
        self.gate_proj = _linear(config, config.hidden_size, width)
        self.position_bias = nn.Parameter(torch.empty(rate, width, dtype=config.params_dtype))
        self.kv_norm = _norm(config, dim)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[B, S, hidden] to entries [B, E, dim], rotated to the position of their window's first token."""
        num_entries = x.shape[1] // self.rate
        whole = x[:, : num_entries * self.rate]
        kv = self.kv_proj(whole).unflatten(1, (num_entries, self.rate))
        gate = self.gate_proj(whole).unflatten(1, (num_entries, self.rate)) + self.position_bias.to(kv.dtype)
        if self.overlaps:
            kv, gate = _with_window_before(kv, 0.0), _with_window_before(gate, -math.inf)
        entries = self.kv_norm((kv * gate.softmax(2, dtype=torch.float32).to(kv.dtype)).sum(2))
        positions = torch.arange(num_entries, device=x.device) * self.rate
        return rotary(entries.unsqueeze(2), positions).squeeze(2)


class Indexer(nn.Module):
    """Chooses the compressed entries that each query keeps: the best by sum_h w_h relu(q_h . k).

    A choice has no gradient: these parameters are frozen, and leave as they came.
    """

    def __init__(self, config: TransformerConfig, v4: V4Config):
        """Build it, uninitialised."""
        super().__init__()
        self.num_heads, self.dim, self.top_k = v4.index_heads, v4.index_dim, v4.index_top_k
        self.compressor = Compressor(config, v4.sparse_rate, v4.index_dim, overlaps=True)
        self.q_b_proj = _linear(config, v4.q_rank, v4.index_heads * v4.index_dim)
        self.weights_proj = _linear(config, config.hidden_size, v4.index_heads)
        self.requires_grad_(False)  # or weight decay would move them

    @torch.no_grad()
    def forward(self, x: Tensor, q_residual: Tensor, is_closed: Tensor, rotary: Rotary) -> Tensor:
        """Choose.

        Args:
            x: [B, S, hidden].
            q_residual: [B, S, Q].
            is_closed: which entries' windows end at or before each query, bool [S, E].
            rotary: of the layer.

        Returns:
            Which entries each query sees, bool [B, S, E].
        """
        keys = self.compressor(x, rotary)
        queries = self.q_b_proj(q_residual).unflatten(-1, (self.num_heads, self.dim))
        queries = rotary(queries, torch.arange(x.shape[1], device=x.device))
        scores = torch.einsum("bshd,bed->bshe", queries.float(), keys.float()).relu() * self.dim**-0.5
        weights = self.weights_proj(x).float() * self.num_heads**-0.5
        scores = (scores * weights.unsqueeze(-1)).sum(2).masked_fill(~is_closed, -math.inf)
        best = scores.topk(min(self.top_k, keys.shape[1]), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & is_closed


class CompressedAttention(MegatronModule):
    """One layer's attention: the window, the layer's compressed entries if it has any, and a sink per head."""

    def __init__(self, config: TransformerConfig, layer_number: int, v4: V4Config, **_: Any):
        """Build it as Megatron builds self-attention.

        Args:
            config: of the model.
            layer_number: in the whole model, from 1.
            v4: of the model.
        """
        super().__init__(config=config)
        kind = v4.attention[layer_number - 1]
        rope = v4.rope(layer_number - 1)
        self.rotary = Rotary(rope.inverse_frequencies(), rope.attention_factor)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.head_dim, self.window, self.norm_eps = v4.head_dim, v4.window, v4.norm_eps
        self.num_heads, self.num_groups = v4.num_heads // ranks, v4.num_groups // ranks
        hidden, dtype = config.hidden_size, config.params_dtype
        self.q_a_proj = _linear(config, hidden, v4.q_rank)
        self.q_a_norm = _norm(config, v4.q_rank)
        self.kv_proj = _linear(config, hidden, v4.head_dim)
        self.kv_norm = _norm(config, v4.head_dim)
        per_group = v4.num_heads // v4.num_groups * v4.head_dim
        self.q_b_proj = nn.Parameter(torch.empty(self.num_heads * v4.head_dim, v4.q_rank, dtype=dtype))
        self.sinks = nn.Parameter(torch.empty(self.num_heads, dtype=dtype))
        self.o_a_proj = nn.Parameter(torch.empty(self.num_groups * v4.group_rank, per_group, dtype=dtype))
        self.o_b_proj = nn.Parameter(torch.empty(hidden, self.num_groups * v4.group_rank, dtype=dtype))
        for name, dim in _SPLIT.items():
            parameter: Any = getattr(self, name)
            parameter.tensor_model_parallel = ranks > 1  # Megatron counts it on each rank in gradient norms
            parameter.partition_dim, parameter.partition_stride = dim, 1
        self.compressor = self.indexer = None
        if kind != SLIDING:
            rate = v4.sparse_rate if kind == SPARSE else v4.heavy_rate
            self.compressor = Compressor(config, rate, v4.head_dim, overlaps=kind == SPARSE)
        if kind == SPARSE:
            self.indexer = Indexer(config, v4)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, packed_seq_params: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Attend; a causal mask is implied.

        Args:
            hidden_states: [S, B, hidden]; this rank's part of S under sequence parallelism.
            attention_mask: must be None.
            packed_seq_params: where sequences lie one behind the other, with B = 1; None if they are right-padded.

        Returns:
            As `hidden_states`; and no bias.
        """
        assert attention_mask is None
        is_split = self.config.sequence_parallel
        if is_split:
            # What follows up to the heads is the same on every rank: gradients are split, not summed.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        x = hidden_states.transpose(0, 1)
        if packed_seq_params is None:
            output = self._attend(x)
        else:
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
            output = torch.cat([self._attend(part) for part in x.split(lengths, dim=1)], dim=1)
        output = output.transpose(0, 1)
        if is_split:
            return reduce_scatter_to_sequence_parallel_region(output), None
        return reduce_from_tensor_model_parallel_region(output), None

    def _attend(self, x: Tensor) -> Tensor:
        """[B, S, hidden] to this rank's share of the output's sum."""
        positions = torch.arange(x.shape[1], device=x.device)
        q_residual = self.q_a_norm(self.q_a_proj(x))
        queries = nn.functional.linear(copy_to_tensor_model_parallel_region(q_residual), self.q_b_proj)
        queries = unit_rms(queries.unflatten(-1, (self.num_heads, self.head_dim)), self.norm_eps)
        queries = self.rotary(queries, positions)
        keys = self.rotary(self.kv_norm(self.kv_proj(x)).unsqueeze(2), positions).squeeze(2)
        distance = positions[:, None] - positions
        sees = ((distance >= 0) & (distance < self.window)).expand(len(x), -1, -1)
        if self.compressor is not None:
            entries = self.compressor(x, self.rotary)
            keys = torch.cat((keys, entries), 1)
            sees = torch.cat((sees, self._entries_seen(x, q_residual, entries.shape[1])), -1)
        context = self._mix(queries, copy_to_tensor_model_parallel_region(keys), sees)
        # Values were rotated as keys: turned back by the query's position, they depend on distances alone.
        context = self.rotary(context, positions, undo=True).flatten(2)
        weight = self.o_a_proj.unflatten(0, (self.num_groups, -1))
        grouped = torch.einsum("bsgi,goi->bsgo", context.unflatten(-1, (self.num_groups, -1)), weight)
        return nn.functional.linear(grouped.flatten(2), self.o_b_proj)

    def _entries_seen(self, x: Tensor, q_residual: Tensor, num_entries: int) -> Tensor:
        """Which entries each query sees: those of windows that have ended, or the indexer's choice of them."""
        assert self.compressor is not None
        ended = (torch.arange(x.shape[1], device=x.device) + 1) // self.compressor.rate
        is_closed = torch.arange(num_entries, device=x.device) < ended[:, None]
        if self.indexer is None or not num_entries:
            return is_closed.expand(len(x), -1, -1)
        return self.indexer(x.detach(), q_residual.detach(), is_closed, self.rotary)

    def _mix(self, queries: Tensor, keys: Tensor, sees: Tensor) -> Tensor:
        """Softmax over keys and sink; keys are the values too. [B, S, H, D], [B, T, D], [B, S, T] to [B, S, H, D]."""
        scores = torch.einsum("bshd,btd->bhst", queries, keys) * self.head_dim**-0.5
        scores = scores.masked_fill(~sees.unsqueeze(1), -math.inf)
        sink = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        return torch.einsum("bhst,btd->bshd", weights, keys)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """What of it lies where, for distributed checkpoints."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, _SPLIT, sharded_offsets
        )


def _with_window_before(windows: Tensor, fill: float) -> Tensor:
    """[B, E, rate, 2 D] to [B, E, 2 rate, D]: first halves of the window before (or `fill`), second of its own."""
    before, own = windows.chunk(2, dim=-1)
    before = nn.functional.pad(before, (0, 0, 0, 0, 1, 0), value=fill)[:, :-1]
    return torch.cat((before, own), 2)


def _linear(config: TransformerConfig, inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False, dtype=config.params_dtype)


def _norm(config: TransformerConfig, channels: int) -> RMSNorm:
    norm = RMSNorm(config, channels, eps=config.layernorm_epsilon)
    norm.weight.sequence_parallel = False  # pyright: ignore[reportAttributeAccessIssue]  # it sees the whole sequence
    return norm
