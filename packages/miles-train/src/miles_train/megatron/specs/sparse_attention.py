"""DeepSeek sparse attention (DeepSeek-V3.2, arXiv:2512.02556, section 2.1): each query sees the keys an indexer chose.

Megatron's own (experimental_attention_variant/dsa.py, 0.19.2) turns the indexer's vectors by a Hadamard matrix from a
CUDA package, in bfloat16 alone. The matrix is orthogonal, so scores are the same without it, but for rounding; here
they are computed on any device in the model's dtype, as in transformers. The choice has no gradient, so the indexer's
weights are frozen: they load, stay and are exported as they are.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from miles_train.megatron.latent_config import IndexerConfig
from miles_train.megatron.specs.latent_attention import Rotation, sequence_starts
from miles_train.megatron.upstream import MegatronModule, TransformerConfig, gather_from_sequence_parallel_region

# Scores of the indexer for one block of queries stay below this.
MAX_SCORE_BYTES = 256 * 2**20
_KEY_NORM_EPS = 1e-6


@dataclass(slots=True, eq=False)
class Choice:
    """What one indexer chose in the last forward pass, for the layers behind it that share the choice.

    Attributes:
        keys: one int64 [B, S, top_k] for each sequence, or batch of padded ones; None for all keys.
    """

    keys: list[Tensor | None] = field(default_factory=list)


class Indexer(torch.nn.Module):
    """Scores every key for every query and chooses the best."""

    def __init__(self, config: Any, indexer: IndexerConfig, rotation: Rotation):
        """Build it; its parameters are named as in the checkpoint and take no gradient.

        Args:
            config: brings the width of the residual stream, the rank of the queries and the dtype.
            indexer: its sizes.
            rotation: of the first channels of its heads.
        """
        super().__init__()
        self.indexer, self.rotation = indexer, rotation
        heads, dim = indexer.num_heads, indexer.head_dim
        options: Any = {"bias": False, "dtype": config.params_dtype}
        self.wq_b = torch.nn.Linear(config.q_lora_rank, heads * dim, **options)
        self.wk = torch.nn.Linear(config.hidden_size, dim, **options)
        self.k_norm = torch.nn.LayerNorm(dim, eps=_KEY_NORM_EPS, dtype=config.params_dtype)
        self.weights_proj = torch.nn.Linear(config.hidden_size, heads, **options)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, hidden: Tensor, latent: Tensor) -> Tensor:
        """Choose keys.

        Args:
            hidden: the layer's normalised input, [S, B, hidden].
            latent: what queries are made of, [S, B, q_rank].

        Returns:
            int64 [B, S, k], k = min(top_k, S). Where a query has fewer keys before it than k, the rest lie behind it.
        """
        length, heads = len(hidden), self.indexer.num_heads
        positions = torch.arange(length, device=hidden.device)
        angles = self.rotation.angles(positions, hidden.dtype)
        queries = self._turned(self.wq_b(latent).unflatten(-1, (heads, -1)), angles)
        keys = self._turned(self.k_norm(self.wk(hidden)), angles).float().permute(1, 2, 0)  # [B, dim, S]
        weights = self.weights_proj(hidden).float() * heads**-0.5
        size = max(1, MAX_SCORE_BYTES // (4 * heads * length * hidden.shape[1]))
        chosen = []
        for query, weight, position in zip(
            queries.split(size), weights.split(size), positions.split(size), strict=True
        ):
            scores = torch.matmul(query.float().permute(1, 0, 2, 3), keys.unsqueeze(1)) * self.indexer.head_dim**-0.5
            total = torch.matmul(weight.transpose(0, 1).unsqueeze(-2), scores.relu()).squeeze(-2)  # [B, block, S]
            total = total.masked_fill(positions > position[:, None], float("-inf"))
            chosen.append(total.topk(min(self.indexer.top_k, length), dim=-1).indices)
        return torch.cat(chosen, dim=1)

    def _turned(self, channels: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        rotary, rest = channels.tensor_split([self.rotation.rope.dim], dim=-1)
        return torch.cat([self.rotation.turn(rotary, angles), rest], dim=-1)


class SparseAttention(MegatronModule):
    """Attention over the keys that an indexer chose: this layer's own, or that of a layer before it."""

    # Megatron's latent attention then hands the layer's input and the queries' latent vectors over.
    requires_dsa_inputs = True

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        *,
        indexer: IndexerConfig,
        rotation: Rotation,
        choice: Choice,
        is_full: bool,
        **_: Any,
    ):
        """Build it as Megatron builds core attention.

        Args:
            config: of latent attention.
            layer_number: from 1; unused, part of Megatron's contract.
            softmax_scale: factor on the scores.
            indexer: sizes of the indexer.
            rotation: of the indexer's rotary channels.
            choice: where the choice is kept for the layers that share it.
            is_full: whether this layer chooses.
        """
        super().__init__(config=config)
        self.softmax_scale, self.choice, self.top_k = softmax_scale, choice, indexer.top_k
        self.indexer = Indexer(config, indexer, rotation) if is_full else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        attn_mask_type: Any = None,
        *,
        x: Tensor,
        qr: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, heads, head_dim], or [S, heads, head_dim] where sequences are packed.
            key: as query.
            value: as query, with its own head_dim.
            attention_mask: must be None: it is causal.
            packed_seq_params: where sequences end, if B = 1 row holds several.
            attn_mask_type: unused, part of Megatron's contract.
            x: the layer's normalised input, [S, B, hidden]; with sequence parallelism this rank's part of the sequence.
            qr: what the queries were made of, as x, [S, B, q_rank].

        Returns:
            [S, B, heads * head_dim], or [S, heads * head_dim].
        """
        assert attention_mask is None
        if packed_seq_params is not None:
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
        lengths = sequence_starts(len(query), packed_seq_params, query.device).diff().tolist()
        if self.indexer is not None:
            self.choice.keys = self._choose(self.indexer, x.detach(), qr.detach(), lengths)
        parts = zip(*(part.split(lengths) for part in (query, key, value)), self.choice.keys, strict=True)
        context = torch.cat([self._attend(*part) for part in parts]).flatten(2)
        return context if packed_seq_params is None else context.squeeze(1)

    def _choose(self, indexer: Indexer, hidden: Tensor, latent: Tensor, lengths: list[int]) -> list[Tensor | None]:
        if self.config.sequence_parallel:
            hidden, latent = (gather_from_sequence_parallel_region(part.contiguous()) for part in (hidden, latent))
        parts = zip(hidden.split(lengths), latent.split(lengths), strict=True)
        return [indexer(*part) if len(part[0]) > self.top_k else None for part in parts]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None) -> Tensor:
        """Causal attention of one sequence [S, B, heads, head_dim] over the chosen keys."""
        mask = None
        if keys is not None:
            mask = torch.zeros(*keys.shape[:2], len(key), dtype=torch.bool, device=keys.device).scatter_(-1, keys, True)
            mask = mask.tril().unsqueeze(1)  # for all heads
        context = torch.nn.functional.scaled_dot_product_attention(
            *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
        )
        return context.permute(2, 0, 1, 3)
