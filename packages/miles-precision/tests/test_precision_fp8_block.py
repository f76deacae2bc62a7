"""FP8 block against a written-out loop that shares nothing with it, and against its derived error bound."""

import bisect
import itertools
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_precision import FormatError, FP8Block
from miles_precision.conformance import same_parts

torch.set_num_threads(1)

FP8 = FP8Block()


# --- the loop: no torch arithmetic, no float8 cast ------------------------------------------------------------------


def e4m3(code: int) -> float:
    """The value of the codes 0x00 to 0x7e, from the bits: 4 of exponent with bias 7, 3 of mantissa."""
    exponent, mantissa = code >> 3, code & 7
    return math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)


E4M3 = [e4m3(code) for code in range(0x7F)]
MIDPOINTS = [(low + high) / 2 for low, high in itertools.pairwise(E4M3)]  # exact: few bits


def float32(value: float) -> float:
    """Round to float32. A float64 quotient or product of two float32 numbers so rounded is the float32 one."""
    return struct.unpack("f", struct.pack("f", value))[0]


def nearest_code(value: float) -> int:
    index = bisect.bisect_left(MIDPOINTS, abs(value))
    tie = index < len(MIDPOINTS) and abs(value) == MIDPOINTS[index]
    code = index + (index % 2 if tie else 0)
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def loop_encode(matrix: list[list[float]]) -> tuple[list[list[int]], list[list[float]]]:
    """Codes [N][K] and scales [ceil(N / 128)][ceil(K / 128)] of a matrix of float32 values."""
    rows, columns = len(matrix), len(matrix[0])
    codes = [[0] * columns for _ in range(rows)]
    scales = []
    for top in range(0, rows, 128):
        scales.append([])
        for left in range(0, columns, 128):
            inside = [(n, k) for n in range(top, min(top + 128, rows)) for k in range(left, min(left + 128, columns))]
            amax = max(abs(matrix[n][k]) for n, k in inside)
            scale = float32(max(amax, float32(1e-10)) / 448)
            scales[-1].append(scale)
            for n, k in inside:
                codes[n][k] = nearest_code(float32(matrix[n][k] / scale))
    return codes, scales


def loop_decode(codes: list[list[int]], scales: list[list[float]]) -> list[list[float]]:
    return [
        [
            float32(math.copysign(E4M3[code & 0x7F], 0.5 - (code >> 7)) * scales[n // 128][k // 128])
            for k, code in enumerate(row)
        ]
        for n, row in enumerate(codes)
    ]


# --- weights: trained, wild, tied, tiny, large -----------------------------------------------------------------------


@st.composite
def weights(draw, longest=150):
    shape = (draw(st.integers(1, longest)), draw(st.integers(1, longest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    normal = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["trained", "wild", "ties", "powers", "sparse"]))
    if kind == "wild":
        normal = normal * (4 * torch.randn(shape, generator=generator)).exp()
    elif kind == "ties":  # odd multiples of half a step: every rounding decides between two neighbours
        normal = (normal * 64).round().clamp(-223, 223) / 8
        normal[0, 0] = 28.0
    elif kind == "powers":
        normal = torch.ldexp(normal.sign(), (6 * normal).round())
    elif kind == "sparse":
        normal = normal * (normal.abs() > 2)
    weight = normal * 10.0 ** draw(st.integers(-14, 30))
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))).nan_to_num()


@settings(max_examples=60, deadline=None)
@given(weights())
def test_bits_are_those_of_the_written_out_loop(weight):
    parts = FP8.encode(weight)
    codes, scales = loop_encode(weight.float().tolist())
    assert parts["weight"].view(torch.uint8).tolist() == codes
    assert parts["weight_scale_inv"].tolist() == scales
    assert FP8.decode(parts).tolist() == loop_decode(codes, scales)


def test_every_code_is_read_as_the_loop_reads_it():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    values = FP8.decode({"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 2)})[0].tolist()
    for code, value in enumerate(values):
        if code & 0x7F == 0x7F:
            assert math.isnan(value)
        else:
            assert value == loop_decode([[code]], [[1.0]])[0][0]


@settings(max_examples=60, deadline=None)
@given(weights(longest=300))
def test_error_is_within_the_derived_bound(weight):
    """Half a step of e4m3 at |w|, three float32 roundings, and half an ulp of the dtype asked for."""
    exact = weight.double()
    parts = FP8.encode(weight)
    scale = parts["weight_scale_inv"].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    scale = scale[: weight.shape[0], : weight.shape[1]]
    bound = torch.maximum(2**-4 * exact.abs(), 2**-10 * scale) * (1 + 2**-20)
    assert ((FP8.decode(parts).double() - exact).abs() <= bound).all()
    assert ((FP8.decode(parts).double() - exact).abs() <= 16 * scale * (1 + 2**-17)).all()
    back = FP8.decode(parts, dtype=torch.bfloat16).double()
    assert ((back - exact).abs() <= bound + 2**-8 * back.abs() + 2**-134).all()


def test_the_bound_is_reached():
    """With scale 1, three ties: half a step of 32 (amax / 28), a seventeenth of 17, half a step of 2^-9."""
    weight = torch.tensor([[448.0, 432.0, 17.0, 2**-10]])
    assert FP8.decode(FP8.encode(weight)).tolist() == [[448.0, 448.0, 16.0, 0.0]]


@settings(max_examples=40, deadline=None)
@given(weights(longest=260))
def test_encoding_again_does_not_drift(weight):
    """From bfloat16 the same bytes; from float32 the same codes and scales within one ulp."""
    bf16 = weight.to(torch.bfloat16).nan_to_num()
    parts = FP8.encode(bf16)
    assert same_parts(FP8.encode(FP8.decode(parts, dtype=torch.bfloat16)), parts)
    parts = FP8.encode(weight.float())
    again = FP8.encode(FP8.decode(parts))
    assert torch.equal(again["weight"].view(torch.uint8), parts["weight"].view(torch.uint8))
    ulps = again["weight_scale_inv"].view(torch.int32) - parts["weight_scale_inv"].view(torch.int32)
    assert ulps.abs().max() <= 1


def test_edges_and_stacks_have_a_scale_of_their_own():
    weight = torch.ones(2, 130, 257)
    weight[0, 129, 256] = 448.0
    weight[1] = 0.0
    parts = FP8.encode(weight)
    assert parts["weight"].shape == (2, 130, 257)
    assert parts["weight_scale_inv"].shape == (2, 2, 3)
    scales = parts["weight_scale_inv"] * 448
    assert torch.allclose(scales[0], torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 448.0]]))
    assert torch.allclose(scales[1], torch.tensor(1e-10), rtol=1e-6, atol=0)
    assert FP8.decode(parts)[0, 129, 256] == 448.0


def test_the_largest_float32_survives():
    weight = torch.full((4, 4), torch.finfo(torch.float32).max)
    assert torch.isfinite(FP8.decode(FP8.encode(weight))).all()


def test_an_empty_stack_has_empty_parts():
    """A rank that holds no expert of a layer."""
    parts = FP8.encode(torch.ones(0, 130, 20))
    assert parts["weight"].shape == (0, 130, 20) and parts["weight_scale_inv"].shape == (0, 2, 1)
    assert FP8.decode(parts).shape == (0, 130, 20)
    assert FP8.nbytes((0, 130, 20)) == 0


def test_size_of_a_30b_model_is_half_and_a_little():
    experts = (48, 128, 768 * 2048)  # Qwen3-30B-A3B: 48 layers of 128 experts, gate, up and down alike
    total = 3 * 48 * FP8.nbytes((128, 768, 2048))
    assert total == 3 * math.prod(experts) + 3 * 48 * 128 * 6 * 16 * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FP8.encode(torch.ones(8)), r"cannot hold shape \(8,\): it needs \[N, K\]"),
        (lambda: FP8.nbytes((8,)), r"cannot hold shape \(8,\)"),
        (lambda: FP8.encode(torch.tensor([[1.0, math.nan]])), "NaN or infinity"),
        (lambda: FP8.encode(torch.ones(2, 2, dtype=torch.int8)), r"torch.int8: it takes float32, bfloat16 or float16"),
        (lambda: FP8.decode({"weight": torch.ones(2, 2)}), r"parts \['weight'\]: it needs exactly .*weight_scale_inv"),
        (
            lambda: FP8.decode(FP8.encode(torch.ones(2, 2)) | {"weight_scale_inv": torch.ones(2, 1)}),
            r"weight_scale_inv of shape \(2, 1\): a weight of shape \(2, 2\) .* has \(1, 1\) scales",
        ),
        (
            lambda: FP8.decode(FP8.encode(torch.ones(2, 2)) | {"weight_scale_inv": torch.ones(1, 1).bfloat16()}),
            r"weight_scale_inv of torch.bfloat16: it must be torch.float32",
        ),
    ],
)
def test_bad_input_gets_one_clear_error(call, message):
    with pytest.raises(FormatError, match=message):
        call()
