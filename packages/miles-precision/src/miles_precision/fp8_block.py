"""FP8 in blocks of 128x128, as DeepSeek-V3 publishes its weights (arXiv:2412.19437, section 3.3).

Which tensor in which dtype. A weight W of N outputs by K inputs becomes two tensors:

    weight             [N, K]                          float8_e4m3fn  1 sign, 4 exponent, 3 mantissa bits; largest 448
    weight_scale_inv   [ceil(N / 128), ceil(K / 128)]  float32        what to multiply by (despite its name)

and W is read back as `weight * weight_scale_inv`, each scale for its own block. Experts stacked as [E, N, K] get
[E, ceil(N / 128), ceil(K / 128)]. Norms, biases, embeddings, routers and the output head stay in bfloat16. Activations
are the engine's affair: it quantises them as it runs, 1x128 along K, which is why `activation_scheme` is `dynamic`.

Granularity. One scale a block, so that an outlier costs precision in its own 128x128 only. At the right and lower edge
a block is what is left of it: it is padded with zeros, which no maximum notices, and the padding is cut off again.

Layout. Both parts are contiguous and row-major, K innermost, as `[out, in]` linears are and as Hopper's GEMM wants
them. Two upstream limits concern edges: an engine that fuses layers (q, k, v; gate, up) or splits them over GPUs needs
the pieces to be multiples of 128, and transformers (5.12) derives the size of a block from the shapes, N divided by
rows of scales, which is not 128 when N is no multiple of 128. SGLang reads ragged edges as written here.

The rounding we accept. With amax the largest |w| of the block,

    scale = max(amax, 1e-10) / 448      float32, one rounding
    q     = w / scale                   float32, one rounding; |q| <= 448 up to that rounding, so nothing overflows
    code  = q to e4m3                   nearest, ties to even
    w'    = code * scale                float32, one rounding; then one more to the dtype asked for

the third rounding is the one that shows. e4m3 has 4 significant bits down to 2^-6 and steps of 2^-9 below, hence

    |w' - w| <= max(2^-4 |w|, 2^-10 scale) (1 + 2^-20) + half an ulp of the dtype asked for

which is amax / 28 at most, anywhere in the block: half a step of 32, times the scale (the float32 roundings add 2^-17
of that). Encoding what was decoded to bfloat16 gives the same bytes again; what was decoded to float32, the same codes,
and scales that may differ in the last bit.

The floor of 1e-10, the one of SGLang's activation quantiser, keeps a block of zeros from dividing zero by zero and a
scale from being subnormal. A block whose amax lies below it loses bits, but never more than the bound above says.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_precision.errors import FormatError
from miles_precision.format import Parts, require_input_dtype, require_parts, straight_through
from miles_precision.ignored import FUSED_MODULES, with_fused_modules

BLOCK = 128
"""Rows and columns of a block: the tile that Hopper's FP8 GEMM scales by one number."""

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn. Beyond 464 a cast gives NaN: the type has no infinity."""

AMAX_FLOOR = 1e-10
"""Smallest block maximum that a scale is computed from; see the module's last paragraph."""


@dataclass(frozen=True)
class FP8Block:
    """float8 e4m3 in 128x128 blocks: `{"weight": float8_e4m3fn, "weight_scale_inv": float32}`."""

    @property
    def name(self) -> str:
        """`"fp8_block"`."""
        return "fp8_block"

    def encode(self, tensor: Tensor) -> Parts:
        """Quantise `[..., N, K]` block by block.

        Raises:
            FormatError: Fewer than two dimensions; not float32, bfloat16 or float16; NaN or infinity.
        """
        require_input_dtype(tensor, self.name)
        *_, rows, columns = _matrix_shape(tensor.shape)
        blocks = _to_blocks(tensor.detach().float())
        amax = blocks.abs().amax(dim=(-3, -1))
        if not bool(torch.isfinite(amax).all()):
            raise FormatError(
                f"{self.name} cannot encode a tensor with NaN or infinity: one such value would spoil its whole block; "
                "check the optimizer step that wrote this weight"
            )
        # A tensor, not a Python number: on CUDA, torch multiplies by the reciprocal of a number, which rounds twice and
        # gave other bits than the CPU for 54 % of random scales on an H100.
        scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, E4M3_MAX)
        codes = (blocks / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
        return {
            "weight": _from_blocks(codes)[..., :rows, :columns].contiguous(),
            "weight_scale_inv": scale,
        }

    def decode(self, parts: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply each block by its scale in float32 and round to `dtype`.

        Raises:
            FormatError: Anything but the two parts, in their dtypes and with shapes that fit each other.
        """
        require_parts(parts, {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}, self.name)
        weight, scale = parts["weight"], parts["weight_scale_inv"]
        *_, rows, columns = _matrix_shape(weight.shape)
        if tuple(scale.shape) != _scale_shape(weight.shape):
            raise FormatError(
                f"{self.name} cannot decode weight_scale_inv of shape {tuple(scale.shape)}: a weight of shape "
                f"{tuple(weight.shape)} in blocks of {BLOCK}x{BLOCK} has {_scale_shape(weight.shape)} scales"
            )
        by_row = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
        by_element = by_row.repeat_interleave(BLOCK, dim=-1)[..., :columns]
        return (weight.float() * by_element).to(dtype)

    def fake_quantize(self, tensor: Tensor) -> Tensor:
        """Quantise and read back, in the dtype of `tensor`; the gradient passes through unchanged."""
        return straight_through(self, tensor)

    def nbytes(self, shape: Sequence[int]) -> int:
        """One byte an element and four a block.

        Raises:
            FormatError: Fewer than two dimensions.
        """
        return math.prod(_matrix_shape(shape)) + 4 * math.prod(_scale_shape(shape))

    def quantization_config(
        self, ignored: Iterable[str] = (), fused: Mapping[str, Sequence[str]] = FUSED_MODULES
    ) -> dict[str, Any]:
        """What makes transformers and SGLang load the two parts.

        Args:
            ignored: Linear layers kept in bfloat16, named as `with_fused_modules` says; it adds the fused names.
            fused: Which layers the engine fuses.

        Raises:
            FormatError: Some but not all members of a layer that engines fuse are ignored.
        """
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": with_fused_modules(ignored, fused),
        }


def _matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, if blocks can be cut from it."""
    if len(shape) < 2:
        raise FormatError(
            f"fp8_block cannot hold shape {tuple(shape)}: it needs [N, K] or stacked [E, N, K]; keep norms and biases "
            "in bf16"
        )
    return tuple(shape)


def _scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scales of a weight of this shape."""
    *lead, rows, columns = _matrix_shape(shape)
    return (*lead, -(-rows // BLOCK), -(-columns // BLOCK))


def _to_blocks(matrix: Tensor) -> Tensor:
    """[..., N, K] -> [..., ceil(N / 128), 128, ceil(K / 128), 128], padded with zeros."""
    *lead, row_blocks, column_blocks = _scale_shape(matrix.shape)
    padded = torch.nn.functional.pad(
        matrix,
        (0, column_blocks * BLOCK - matrix.shape[-1], 0, row_blocks * BLOCK - matrix.shape[-2]),
    )
    return padded.reshape(*lead, row_blocks, BLOCK, column_blocks, BLOCK)


def _from_blocks(blocks: Tensor) -> Tensor:
    """The inverse of `_to_blocks`, padding included."""
    *lead, row_blocks, _, column_blocks, _ = blocks.shape
    return blocks.reshape(*lead, row_blocks * BLOCK, column_blocks * BLOCK)
