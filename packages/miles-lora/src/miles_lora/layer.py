"""One linear with a low-rank path beside its weight.

The linear is not wrapped: it becomes a `LoraLinear` in place, the same object with the same weight under the same name,
and gains the children `lora_A` and `lora_B`. Hence a checkpoint of the base model still fits, weights are still
published under their own names, and hooks on the linear stay where they were.

Which tensor in which dtype: the base as it was, A and B in a dtype of their own (float32 unless asked otherwise: a
bfloat16 parameter cannot take the small steps of its optimizer). The path is computed in the dtype of A and B and
added to the base's output before that sum is rounded once to the output's dtype, as peft does, bit by bit.
"""

import functools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from miles_lora.config import LoraConfig
from miles_lora.errors import LoraError


class LoraLinear(nn.Linear):
    """y = base(x) + scaling * B A dropout(x). Made by `attach`, unmade by `detach`.

    Attributes:
        lora_A: Linear whose weight is A, `[rank, in_features]`.
        lora_B: Linear whose weight is B, `[out_features, rank]`.
        lora_dropout: Acts on the input of A, in training mode only.
        lora_config: What it was made from.
    """

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_dropout: nn.Dropout
    lora_config: LoraConfig
    _weight_before_merge: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of the base's output."""
        output = super().forward(input)
        if self.merged:
            return output
        low = self.lora_A(self.lora_dropout(input.to(self.lora_A.weight.dtype)))
        return (output + self.lora_B(low) * self.lora_config.scaling).to(output.dtype)

    @property
    def merged(self) -> bool:
        """Whether the low-rank path is in the weight at the moment."""
        return self._weight_before_merge is not None

    def merged_weight(self) -> Tensor:
        """W + scaling * B A, in float32 (float64 where one of them is), rounded once to the dtype of W."""
        dtype = functools.reduce(
            torch.promote_types, (self.weight.dtype, self.lora_A.weight.dtype, self.lora_B.weight.dtype), torch.float32
        )
        delta = (self.lora_B.weight.to(dtype) @ self.lora_A.weight.to(dtype)) * self.lora_config.scaling
        return (self.weight.to(dtype) + delta).to(self.weight.dtype)

    def put_in(self, merged: Tensor) -> None:
        """Overwrite the weight, at its address, and keep a copy of what it was."""
        self._weight_before_merge = self.weight.detach().clone()
        self.weight.copy_(merged)

    def take_out(self) -> None:
        """Restore the weight, at its address, to the bytes it had before `put_in`."""
        assert self._weight_before_merge is not None
        self.weight.copy_(self._weight_before_merge)
        self._weight_before_merge = None

    def extra_repr(self) -> str:
        """The linear's own, and the adapter's size."""
        return f"{super().extra_repr()}, rank={self.lora_config.rank}, scaling={self.lora_config.scaling:g}"


def make_lora(
    linear: nn.Linear, config: LoraConfig, dtype: torch.dtype, generator: torch.Generator | None
) -> LoraLinear:
    """Turn a linear into a `LoraLinear` in place: A uniform as torch starts a linear, B zero, so nothing acts yet."""
    lora_A = _empty_linear(linear.in_features, config.rank, linear.weight.device, dtype)
    lora_B = _empty_linear(config.rank, linear.out_features, linear.weight.device, dtype)
    nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(lora_B.weight)
    linear.__class__ = _lora_class(type(linear))
    layer = cast(LoraLinear, linear)
    layer.lora_A, layer.lora_B, layer.lora_dropout = lora_A, lora_B, nn.Dropout(config.dropout)
    layer.lora_config, layer._weight_before_merge = config, None
    return layer.train(linear.training)


def unmake_lora(layer: LoraLinear) -> None:
    """Turn a `LoraLinear` back into what it was made from; a merged weight stays merged."""
    for name in ("lora_A", "lora_B", "lora_dropout", "lora_config", "_weight_before_merge"):
        delattr(layer, name)
    layer.__class__ = cast(type[LoraLinear], _plain_class(type(layer)))


def require_linear(name: str, module: nn.Module, parent: nn.Module) -> nn.Linear:
    """Refuse a target that cannot carry an adapter.

    Raises:
        LoraError: Not a linear, one that carries an adapter already, or one that is read instead of called.
    """
    if not isinstance(module, nn.Linear):
        raise LoraError(
            f"target {name} is of type {type(module).__name__}: an adapter goes on torch.nn.Linear alone, so narrow "
            "the targets"
        )
    if isinstance(module, LoraLinear):
        raise LoraError(f"target {name} carries an adapter already: detach(model) first")
    if isinstance(parent, nn.MultiheadAttention):
        raise LoraError(
            f"target {name} belongs to torch.nn.MultiheadAttention, which reads its weight and never calls it, so an "
            "adapter would do nothing: leave it out of the targets"
        )
    return module


def _empty_linear(inputs: int, outputs: int, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """A linear without bias whose values are not set, so that none are drawn from torch's global generator."""
    return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, bias=False, device=device, dtype=dtype))


@functools.cache
def _lora_class(plain: type[nn.Linear]) -> type[LoraLinear]:
    """`LoraLinear` for `nn.Linear`; for a subclass, one that adds the path to the subclass's own forward."""
    return LoraLinear if plain is nn.Linear else type(f"Lora{plain.__name__}", (LoraLinear, plain), {})


def _plain_class(lora: type[LoraLinear]) -> type[nn.Linear]:
    return nn.Linear if lora is LoraLinear else lora.__bases__[1]
