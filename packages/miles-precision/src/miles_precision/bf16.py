"""BF16: the format of most checkpoints, and the one the others are measured against.

Which tensor in which dtype: every weight is bfloat16 (8 exponent bits as in float32, 8 significant bits), one part,
`weight`, of any shape. No scale, no blocks, no `quantization_config`.

The rounding we accept: bfloat16 input passes unchanged. float32 and float16 are rounded once, to nearest even: at most
half an ulp, |decoded - w| <= 2^-8 |w| (2^-134 where the result is subnormal).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miles_precision.errors import FormatError
from miles_precision.format import Parts, require_input_dtype, require_parts, straight_through
from miles_precision.ignored import FUSED_MODULES


@dataclass(frozen=True)
class BF16:
    """bfloat16: `{"weight": [...] bfloat16}`."""

    @property
    def name(self) -> str:
        """`"bf16"`."""
        return "bf16"

    def encode(self, tensor: Tensor) -> Parts:
        """Round to bfloat16. A contiguous bfloat16 tensor is returned as it is, sharing its memory.

        Raises:
            FormatError: Not float32, bfloat16 or float16; NaN or infinity; or a float32 value beyond bfloat16's
                largest, 3.39e38, which would become infinite.
        """
        require_input_dtype(tensor, self.name)
        weight = tensor.detach().to(torch.bfloat16).contiguous()
        if not bool(torch.isfinite(weight).all()):
            raise FormatError(
                f"{self.name} cannot encode a tensor with NaN, infinity or a value beyond 3.39e38: check the optimizer "
                "step that wrote this weight"
            )
        return {"weight": weight}

    def decode(self, parts: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Widen to `dtype`; exact for float32. For bfloat16 it is the part itself, sharing its memory.

        Raises:
            FormatError: Anything but one bfloat16 part `weight`.
        """
        require_parts(parts, {"weight": torch.bfloat16}, self.name)
        return parts["weight"].to(dtype)

    def fake_quantize(self, tensor: Tensor) -> Tensor:
        """Round to bfloat16 and back to the dtype of `tensor`; the gradient passes through unchanged."""
        return straight_through(self, tensor)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Two bytes an element."""
        return 2 * math.prod(shape)

    def quantization_config(
        self, ignored: Iterable[str] = (), fused: Mapping[str, Sequence[str]] = FUSED_MODULES
    ) -> None:
        """None: a bfloat16 checkpoint has no `quantization_config`, and so nothing to ignore."""
        return None
