"""Manifold-constrained hyper-connections (Xie et al. 2025, arXiv:2512.24880): several residual streams in place of one.

A layer's input is a weighted sum of the streams; its output is added to each with a weight of its own, after the
streams have been mixed by a doubly stochastic matrix. All weights follow from the streams, token by token. Follows
transformers/models/deepseek_v4/modeling_deepseek_v4.py; everything here is computed in float32.
"""

import torch
from torch import Tensor, nn

from miles_train.megatron.upstream import TransformerConfig


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight over the last dim; the mean square is taken in float32."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps).to(x.dtype)


class HyperConnection(nn.Module):
    """Collapses the streams into one input, and says how the output goes back.

    With n streams of width D: `fn` [(2 + n) n, n D] makes logits of `pre` (n), `post` (n) and `comb` (n n), each scaled
    by its entry of `scale` [3] and shifted by its part of `base` [(2 + n) n].
    """

    def __init__(self, config: TransformerConfig, num_streams: int, sinkhorn_iters: int, eps: float):
        """Build it, uninitialised.

        Args:
            config: brings the width and sequence parallelism.
            num_streams: n.
            sinkhorn_iters: normalisations of the mixer (of rows, then columns; the first is the softmax).
            eps: see `V4Config.stream_eps`.
        """
        super().__init__()
        self.num_streams, self.sinkhorn_iters, self.eps = num_streams, sinkhorn_iters, eps
        self.norm_eps = config.layernorm_epsilon
        mix = (2 + num_streams) * num_streams
        self.fn = _parameter(config, mix, num_streams * config.hidden_size)
        self.base = _parameter(config, mix)
        self.scale = _parameter(config, 3)

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weigh the streams of each token.

        Args:
            streams: [S, B, n, D].

        Returns:
            The layer's input [S, B, D]; `post` [S, B, n]; `comb` [S, B, n, n] (from, to).
        """
        n = self.num_streams
        logits = nn.functional.linear(unit_rms(streams.flatten(2).float(), self.norm_eps), self.fn.float())
        scale, base = self.scale.float(), self.base.float()
        parts = zip(logits.split([n, n, n * n], -1), scale, base.split([n, n, n * n]), strict=True)
        pre, post, comb = (part * factor + shift for part, factor, shift in parts)
        pre = pre.sigmoid() + self.eps
        collapsed = (pre.unsqueeze(-1) * streams).sum(2).to(streams.dtype)
        return collapsed, 2 * post.sigmoid(), self._doubly_stochastic(comb.unflatten(-1, (n, n)))

    def _doubly_stochastic(self, logits: Tensor) -> Tensor:
        """Sinkhorn-Knopp: rows and columns are divided by their sums in turn."""
        comb = logits.softmax(-1) + self.eps
        comb = comb / (comb.sum(-2, keepdim=True) + self.eps)
        for _ in range(self.sinkhorn_iters - 1):
            comb = comb / (comb.sum(-1, keepdim=True) + self.eps)
            comb = comb / (comb.sum(-2, keepdim=True) + self.eps)
        return comb


def expand(output: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after a layer.

    Args:
        output: of the layer, [S, B, D].
        streams: before it, [S, B, n, D].
        post: how much of the output each stream takes, [S, B, n].
        comb: how the streams mix, [S, B, n, n] (from, to).
    """
    dtype = streams.dtype
    return post.to(dtype).unsqueeze(-1) * output.unsqueeze(-2) + comb.to(dtype).transpose(-1, -2) @ streams


class HyperHead(nn.Module):
    """Collapses the streams for the last time: a weighted sum with `sigmoid(scale * logits + base) + eps`."""

    def __init__(self, config: TransformerConfig, num_streams: int, eps: float):
        """Build it, uninitialised; arguments as for `HyperConnection`."""
        super().__init__()
        self.eps, self.norm_eps = eps, config.layernorm_epsilon
        self.fn = _parameter(config, num_streams, num_streams * config.hidden_size)
        self.base = _parameter(config, num_streams)
        self.scale = _parameter(config, 1)

    def forward(self, streams: Tensor) -> Tensor:
        """[S, B, n, D] to [S, B, D]."""
        logits = nn.functional.linear(unit_rms(streams.flatten(2).float(), self.norm_eps), self.fn.float())
        pre = (logits * self.scale.float() + self.base.float()).sigmoid() + self.eps
        return (pre.unsqueeze(-1) * streams).sum(2).to(streams.dtype)


def _parameter(config: TransformerConfig, *shape: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
    # Under sequence parallelism each rank sees part of the tokens: the mark makes Megatron sum its gradient.
    parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
    return parameter
