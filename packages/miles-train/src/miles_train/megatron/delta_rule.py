"""Gated delta rule and its companions in plain torch: what flash-linear-attention's GPU kernels compute, on any device.

The functions take the arguments that Megatron's GatedDeltaNet passes to those kernels, under their names. All work in
float32 and answer in the dtype of their input. Packed sequences are cut at `cu_seqlens` and computed one by one.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by the Euclidean norm over the last dim; eps is added to the squared norm."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Convolve every channel over the tokens before it and itself, then apply SiLU.

    Args:
        x: [B, T, channels]; B = 1 if packed.
        weight: [channels, width]; the last column belongs to the token itself.
        bias: [channels].
        activation: "silu" or "swish".
        initial_state: must be None: sequences start empty.
        output_final_state: must be False: nothing is decoded.
        cu_seqlens: int32 [sequences + 1], where packed sequences begin and end.

    Returns:
        Like x, and no state.
    """
    assert activation in ("silu", "swish") and initial_state is None and not output_final_state

    def convolve(part: Tensor) -> Tensor:
        padded = functional.pad(part.transpose(1, 2), (weight.shape[-1] - 1, 0))
        convolved = functional.conv1d(padded, weight[:, None].to(x.dtype), bias, groups=weight.shape[0])
        return functional.silu(convolved).transpose(1, 2)

    return _each_sequence(convolve, cu_seqlens, x), None


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Write v to the key k in a decaying memory, after taking out what the memory holds there; read it at q.

    Per head, with the memory S [key_dim, value_dim] and S = 0 before the first token:
    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T and o_t = S_t^T q_t / sqrt(key_dim).
    Computed in chunks of 64 tokens, whose inner dependencies are one triangular system: Yang, Kautz and Hatamizadeh
    2024, "Gated Delta Networks" (arXiv:2412.06464), section 3.3.

    Args:
        q: [B, T, heads, key_dim]; B = 1 if packed.
        k: as q, of norm 1.
        v: [B, T, heads, value_dim].
        g: logarithm of the decay, [B, T, heads], at most 0.
        beta: how much is written, [B, T, heads], 0 to 1.
        initial_state: must be None: sequences start empty.
        output_final_state: must be False: nothing is decoded.
        use_qk_l2norm_in_kernel: must be False: q and k are normalised already.
        cu_seqlens: int32 [sequences + 1], where packed sequences begin and end.

    Returns:
        Like v, and no state.
    """
    assert initial_state is None and not output_final_state and not use_qk_l2norm_in_kernel
    return _each_sequence(_delta_rule, cu_seqlens, q, k, v, g, beta), None


def _each_sequence(function: Callable[..., Tensor], cu_seqlens: Tensor | None, *columns: Tensor) -> Tensor:
    """Call it once, or once for each packed sequence: all columns are [1, T, ...] then."""
    if cu_seqlens is None:
        return function(*columns)
    lengths = cu_seqlens.diff().tolist()
    parts = zip(*(column.split(lengths, dim=1) for column in columns), strict=True)
    return torch.cat([function(*part) for part in parts], dim=1)


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One call's worth of `chunk_gated_delta_rule`, shapes as there."""
    length, size = v.shape[1], min(CHUNK, v.shape[1])
    # To [B, heads, chunks, size, ...]. Padding at the end has k = 0 and g = 0: it writes nothing and nothing decays.
    query, key, value, decay, write = (_chunked(column, size) for column in (q, k, v, g[..., None], beta[..., None]))
    query = query * q.shape[-1] ** -0.5
    decay = decay.cumsum(dim=-2)  # from the start of the chunk to each token, as a logarithm
    earlier = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
    between = (decay - decay.transpose(-1, -2)).masked_fill(~earlier, -torch.inf).exp()  # from column to row

    # What a token writes depends on what those before it in the chunk wrote: (1 + L) new = write (v - old memory).
    system = (write * key) @ key.transpose(-1, -2) * between
    right_side = torch.cat([write * value, write * decay.exp() * key], dim=-1)
    solved = torch.linalg.solve_triangular(system.tril(-1), right_side, upper=False, unitriangular=True)
    new_values, old_keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    scores = query @ key.transpose(-1, -2) * between
    reads = query * decay.exp()
    writes = (key * (decay[..., -1:, :] - decay).exp()).transpose(-1, -2)
    kept = decay[..., -1:, :].exp()
    memory = query.new_zeros(*query.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for chunk in range(query.shape[2]):
        new = new_values[:, :, chunk] - old_keys[:, :, chunk] @ memory
        outputs.append(reads[:, :, chunk] @ memory + scores[:, :, chunk] @ new)
        memory = kept[:, :, chunk] * memory + writes[:, :, chunk] @ new
    output = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :length]
    return output.transpose(1, 2).to(v.dtype)


def _chunked(column: Tensor, size: int) -> Tensor:
    """[B, T, heads, dim] to float32 [B, heads, chunks, size, dim], padded with zeros."""
    missing = -column.shape[1] % size
    padded = functional.pad(column.float().transpose(1, 2), (0, 0, 0, missing))
    return padded.unflatten(2, (-1, size))
