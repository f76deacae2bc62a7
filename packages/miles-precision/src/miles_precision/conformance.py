"""The examiner of numeric formats: what every `Format` promises, as checks that any implementation can be put to.

In the tests of a new format, with the largest error its rounding may make:

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conforms(check):
        check(Candidate(MyFormat(), error_bound=lambda weight: 2**-4 * weight.double().abs()))

or, where there is no pytest, `examine(candidate)`, which runs all checks and reports every failure at once. A check
knows the format only through the protocol, so a fused kernel and the plain-torch reference are judged alike; that
they agree bit by bit is `same_parts(kernel.encode(weight), reference.encode(weight))`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miles_precision.errors import FormatError
from miles_precision.format import INPUT_DTYPES, Format

ErrorBound = Callable[[Tensor], Tensor]
"""From a weight, elementwise: the largest |decode(encode(weight)) - weight| in float32 that the format may make."""

DEFAULT_SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1),
    (128, 128),
    (129, 127),
    (40, 300),
    (3, 136, 72),
)
"""A single element, an exact block, edges cut both ways, a wide matrix and stacked experts."""


class ConformanceError(AssertionError):
    """A format breaks a promise of the protocol; the message says which and on what input."""


@dataclass(frozen=True)
class Candidate:
    """A format to examine, and what cannot be told from the protocol alone.

    Attributes:
        format: The implementation.
        error_bound: How far a weight may be from itself after a round trip.
        shapes: Weights to try. A format that cannot hold ragged shapes lists those it holds; keep a stacked one.
        device: Where its tensors live; "cuda" for a kernel.
    """

    format: Format
    error_bound: ErrorBound
    shapes: tuple[tuple[int, ...], ...] = DEFAULT_SHAPES
    device: str = "cpu"


def protocol(candidate: Candidate) -> None:
    """The six members are there, and the name is one that a recipe can spell."""
    _require(isinstance(candidate.format, Format), f"{candidate.format!r} lacks a member of Format")
    name = candidate.format.name
    _require(name.isidentifier() and name.islower(), f"name {name!r} is not lower_case")


def parts_are_plain_tensors(candidate: Candidate) -> None:
    """Parts are contiguous, detached, on the weight's device, and named like attributes of a module."""
    for label, weight in _weights(candidate):
        parts = candidate.format.encode(weight.requires_grad_())
        _require(len(parts) > 0, f"{label}: no parts")
        for name, part in parts.items():
            _require(name.isidentifier(), f"{label}: part name {name!r} is not an identifier")
            _require(part.is_contiguous(), f"{label}: {name} is not contiguous")
            _require(not part.requires_grad, f"{label}: {name} carries a gradient")
            _require(part.device == weight.device, f"{label}: {name} moved to {part.device}")


def size_is_known_in_advance(candidate: Candidate) -> None:
    """`nbytes(shape)` is what the parts weigh."""
    for label, weight in _weights(candidate):
        said = candidate.format.nbytes(weight.shape)
        real = sum(part.nbytes for part in candidate.format.encode(weight).values())
        _require(said == real, f"{label}: nbytes says {said}, the parts have {real}")


def shape_and_dtype_survive(candidate: Candidate) -> None:
    """A round trip gives back the shape and the dtype asked for; float32 is the default."""
    for label, weight in _weights(candidate):
        parts = candidate.format.encode(weight)
        back = candidate.format.decode(parts, dtype=weight.dtype)
        _require(back.shape == weight.shape, f"{label}: decoded to shape {tuple(back.shape)}")
        _require(back.dtype == weight.dtype, f"{label}: decoded to {back.dtype}")
        _require(candidate.format.decode(parts).dtype == torch.float32, f"{label}: default dtype")


def error_is_bounded(candidate: Candidate) -> None:
    """No element moves farther than `error_bound` allows, and finite weights stay finite."""
    for label, weight in _weights(candidate):
        back = candidate.format.decode(candidate.format.encode(weight))
        _require(bool(torch.isfinite(back).all()), f"{label}: decoded to NaN or infinity")
        error = (back.double() - weight.double()).abs()
        excess = error - candidate.error_bound(weight)
        worst = int(excess.argmax())
        _require(
            bool((excess <= 0).all()),
            f"{label}: {weight.flatten()[worst].item()} came back as {back.flatten()[worst].item()}, farther than "
            "error_bound allows",
        )


def zeros_stay_zero(candidate: Candidate) -> None:
    """A weight of zeros, as a new adapter or an expert that was never routed to has, decodes to zeros."""
    for shape in candidate.shapes:
        zeros = torch.zeros(shape, device=candidate.device)
        back = candidate.format.decode(candidate.format.encode(zeros))
        _require(bool((back == 0).all()), f"zeros of shape {shape} decoded to something else")


def encoding_is_a_function_of_the_values(candidate: Candidate) -> None:
    """The same values give the same bits: on a second call, in another layout, and the input is left alone."""
    for label, weight in _weights(candidate):
        before = weight.clone()
        parts = {name: part.clone() for name, part in candidate.format.encode(weight).items()}
        _require(_same_bits(weight, before), f"{label}: encode changed its input")
        _require(same_parts(candidate.format.encode(weight), parts), f"{label}: not repeatable")
        transposed = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
        _require(
            same_parts(candidate.format.encode(transposed), parts),
            f"{label}: depends on the strides",
        )


def stacked_experts_are_independent(candidate: Candidate) -> None:
    """Encoding a stack is stacking the encodings of its members."""
    for label, weight in _weights(candidate):
        stack = candidate.format.encode(torch.stack((weight, weight.flip(-1) / 2)))
        for index, member in enumerate((weight, weight.flip(-1) / 2)):
            alone = candidate.format.encode(member)
            same = same_parts({name: part[index] for name, part in stack.items()}, alone)
            _require(same, f"{label}: member {index} of a stack differs from itself alone")


def fake_quantize_is_the_round_trip(candidate: Candidate) -> None:
    """`fake_quantize` is `decode(encode())` bit by bit, in the weight's own dtype."""
    for label, weight in _weights(candidate):
        trip = candidate.format.decode(candidate.format.encode(weight), dtype=weight.dtype)
        _require(_same_bits(candidate.format.fake_quantize(weight), trip), f"{label}: differs")


def gradient_passes_straight_through(candidate: Candidate) -> None:
    """The gradient of `fake_quantize` is the one that arrives, unchanged."""
    for label, weight in _weights(candidate):
        leaf = weight.detach().requires_grad_()
        arriving = torch.arange(leaf.numel(), device=leaf.device).reshape(leaf.shape).to(leaf.dtype)
        candidate.format.fake_quantize(leaf).backward(arriving)
        _require(leaf.grad is not None and _same_bits(leaf.grad, arriving), f"{label}: gradient changed")


def non_finite_input_is_refused(candidate: Candidate) -> None:
    """One NaN or infinity anywhere is a `FormatError`, from `encode` and from `fake_quantize`."""
    for shape in candidate.shapes:
        for value in (math.nan, math.inf, -math.inf):
            weight = torch.ones(shape, device=candidate.device)
            weight.view(-1)[-1] = value
            _require_refusal(candidate.format.encode, weight, f"encode took {value} in shape {shape}")
            _require_refusal(
                candidate.format.fake_quantize,
                weight,
                f"fake_quantize took {value} in shape {shape}",
            )


def foreign_input_is_refused(candidate: Candidate) -> None:
    """Integers, float64 and parts that are missing, unknown or mistyped are a `FormatError`."""
    for dtype in (torch.int32, torch.float64):
        weight = torch.ones(candidate.shapes[0], dtype=dtype, device=candidate.device)
        _require_refusal(candidate.format.encode, weight, f"encode took {dtype}")
    parts = candidate.format.encode(torch.ones(candidate.shapes[0], device=candidate.device))
    for name, part in parts.items():
        missing = {other: parts[other] for other in parts if other != name}
        _require_refusal(candidate.format.decode, missing, f"decode did without {name}")
        mistyped = {**parts, name: part.to(torch.float64)}
        _require_refusal(candidate.format.decode, mistyped, f"decode took {name} in float64")
    _require_refusal(
        candidate.format.decode,
        {**parts, "unknown": torch.ones(1)},
        "decode took a part it does not know",
    )


def config_is_json(candidate: Candidate) -> None:
    """`quantization_config` is None, or JSON with a `quant_method` that names what is ignored."""
    config = candidate.format.quantization_config(["lm_head"])
    if config is not None:
        text = json.dumps(config)
        _require(json.loads(text) == config, "quantization_config does not survive JSON")
        _require(bool(config.get("quant_method")), "quantization_config has no quant_method")
        _require("lm_head" in text, "quantization_config does not name the ignored lm_head")


CHECKS: tuple[Callable[[Candidate], None], ...] = (
    protocol,
    parts_are_plain_tensors,
    size_is_known_in_advance,
    shape_and_dtype_survive,
    error_is_bounded,
    zeros_stay_zero,
    encoding_is_a_function_of_the_values,
    stacked_experts_are_independent,
    fake_quantize_is_the_round_trip,
    gradient_passes_straight_through,
    non_finite_input_is_refused,
    foreign_input_is_refused,
    config_is_json,
)
"""Every check; each takes a `Candidate` and raises `ConformanceError`."""


def examine(candidate: Candidate) -> None:
    """Run every check.

    Raises:
        ConformanceError: One line for each check that failed, also for one that the format answered with some other
            exception.
    """
    failures = []
    for check in CHECKS:
        try:
            check(candidate)
        except Exception as error:  # noqa: BLE001  an examiner reports whatever the candidate does
            failures.append(f"{check.__name__}: {error or type(error).__name__}")
    if failures:
        raise ConformanceError("\n".join(failures))


def same_parts(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two encodings have the same names, shapes, dtypes and bits."""
    return left.keys() == right.keys() and all(_same_bits(left[name], right[name]) for name in left)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def _weights(candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
    """Labelled weights: every shape and dtype, with values as trained weights have and as they should not have."""
    generator = torch.Generator().manual_seed(0)
    for shape in candidate.shapes:
        normal = torch.randn(shape, generator=generator)
        values = {
            "normal": 0.02 * normal,
            "outliers": normal * (5 * torch.randn(shape, generator=generator)).exp(),
            "powers of two": torch.ldexp(normal.sign(), (4 * normal).round()),
            "one spike among zeros": torch.zeros(shape).index_put(
                tuple(torch.tensor([size // 2]) for size in shape), torch.tensor(-3.0)
            ),
            "constant": torch.full(shape, -0.7),
        }
        for label, value in values.items():
            for dtype in INPUT_DTYPES:
                limit = torch.finfo(dtype).max
                weight = value.clamp(-limit, limit).to(candidate.device, dtype)
                yield f"{label}, {tuple(shape)}, {dtype}", weight
        for dtype in INPUT_DTYPES:
            extremes = (torch.finfo(dtype).tiny / 4 * normal.to(torch.float32)).to(dtype)
            yield f"subnormal, {tuple(shape)}, {dtype}", extremes.to(candidate.device)
        yield f"near the largest, {tuple(shape)}", (normal.tanh() * 3.38e38).to(candidate.device)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConformanceError(otherwise)


def _require_refusal(function: Callable[[Any], object], argument: Any, otherwise: str) -> None:
    try:
        function(argument)
    except FormatError:
        return
    raise ConformanceError(otherwise)
