"""What a numeric format is: six members, and the errors and the gradient that all formats share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from miles_precision.errors import FormatError
from miles_precision.ignored import FUSED_MODULES

Parts = dict[str, Tensor]
"""One encoded weight: the tensors a checkpoint or a wire carries in its place, by the last component of their
names. A module `m` holds part `weight_scale_inv` under the name `m.weight_scale_inv`."""

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What may be encoded. float64 is left out: it would be rounded twice, first to float32 and then to the format."""


@runtime_checkable
class Format(Protocol):
    """How a weight is represented on the wire, in a checkpoint and in an engine.

    Implementations are stateless: two calls with the same bits return the same bits, on every device.
    `miles_precision.conformance` examines one for everything said here.
    """

    @property
    def name(self) -> str:
        """The name `get_format` knows it by, such as `"fp8_block"`."""
        ...

    def encode(self, tensor: Tensor) -> Parts:
        """Represent a weight.

        Args:
            tensor: `[N, K]` or stacked `[..., N, K]`, float32, bfloat16 or float16; never changed. Members of a
                stack are encoded as if each were alone.

        Returns:
            Contiguous tensors on the same device, without gradient. They belong to the caller, but may share
            memory with `tensor` where no conversion is needed.

        Raises:
            FormatError: NaN or infinity in `tensor`, another dtype, or a shape the format cannot hold. (Looking
                for NaN waits for the device.)
        """
        ...

    def decode(self, parts: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give back the weight that `parts` stand for: `[..., N, K]`, computed in float32, then rounded to `dtype`.

        Raises:
            FormatError: A part is missing, is not one of the format's, or has the wrong dtype or shape.
        """
        ...

    def fake_quantize(self, tensor: Tensor) -> Tensor:
        """What an engine will compute with, in the dtype of `tensor`; the gradient passes through unchanged.

        Bit for bit `decode(encode(tensor), dtype=tensor.dtype)`. Raises what `encode` raises.
        """
        ...

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of all the parts of a weight of this shape, known without encoding one."""
        ...

    def quantization_config(
        self, ignored: Iterable[str] = (), fused: Mapping[str, Sequence[str]] = FUSED_MODULES
    ) -> dict[str, Any] | None:
        """The `quantization_config` of a Hugging Face `config.json`, or None where the file has none.

        Args:
            ignored: Modules that stay as they are, named as in the checkpoint and without `.weight`: all the
                linear layers that are not encoded, the output head among them.
            fused: Which of them the engine runs as one; see `with_fused_modules`.
        """
        ...


class _StraightThrough(torch.autograd.Function):
    """Rounding forward, identity backward (Bengio et al., 2013, arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, format: Format) -> Tensor:
        return format.decode(format.encode(tensor), dtype=tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def straight_through(format: Format, tensor: Tensor) -> Tensor:
    """Round `tensor` to what `format` can hold and let the gradient pass: how a format makes its `fake_quantize`.

    The usual `tensor + (rounded - tensor).detach()` rounds twice more and so misses the engine's values by an ulp;
    this returns them exactly.
    """
    return cast(Tensor, _StraightThrough.apply(tensor, format))


def require_input_dtype(tensor: Tensor, format: str) -> None:
    """Refuse what no format encodes.

    Raises:
        FormatError: The dtype is not one of `INPUT_DTYPES`.
    """
    if tensor.dtype not in INPUT_DTYPES:
        raise FormatError(
            f"{format} cannot encode a tensor of {tensor.dtype}: it takes float32, bfloat16 or float16, so convert "
            "it first with tensor.to(torch.float32)"
        )


def require_parts(parts: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], format: str) -> None:
    """Refuse parts that are not this format's.

    Raises:
        FormatError: `parts` has not exactly the names of `dtypes`, or a part has another dtype.
    """
    if parts.keys() != dtypes.keys():
        raise FormatError(
            f"{format} cannot decode parts {sorted(parts)}: it needs exactly {sorted(dtypes)}, named by the last "
            "component of the tensors' names"
        )
    for name, dtype in dtypes.items():
        if parts[name].dtype != dtype:
            raise FormatError(
                f"{format} cannot decode {name} of {parts[name].dtype}: it must be {dtype}, as encode() returns it"
            )
