"""The examiner passes both formats, and catches every way of being wrong that it was written for."""

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

from miles_precision import BF16, FORMATS, FormatError, FP8Block, get_format
from miles_precision.conformance import CHECKS, Candidate, ConformanceError, examine, same_parts

torch.set_num_threads(1)


def bf16_bound(weight):
    return 2**-8 * weight.double().abs() + 2**-134


def fp8_bound(weight):
    """The bound derived in miles_precision.fp8_block, with block maxima found by max pooling."""
    value = weight.double().abs()
    amax = torch.nn.functional.max_pool2d(value.reshape(-1, 1, *value.shape[-2:]), 128, 128, ceil_mode=True)
    scale = amax.clamp(min=1e-10) / 448
    scale = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : value.shape[-2], : value.shape[-1]]
    return torch.maximum(value / 16, scale.reshape(value.shape) / 1024) * (1 + 2**-20)


CANDIDATES = (Candidate(BF16(), bf16_bound), Candidate(FP8Block(), fp8_bound))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.format.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_format_conforms(check, candidate):
    check(candidate)


def test_every_format_is_examined():
    assert {candidate.format.name for candidate in CANDIDATES} == set(FORMATS)


@dataclass(frozen=True)
class Wrong:
    """FP8 with one member replaced."""

    replaced: dict = field(default_factory=dict)
    honest: FP8Block = field(default_factory=FP8Block)

    def __getattr__(self, name):
        return self.replaced[name] if name in self.replaced else getattr(self.honest, name)


fp8 = FP8Block()


def plain_division(tensor):  # no floor: zero blocks divide zero by zero
    scale = tensor.float().abs().amax().reshape((1,) * tensor.ndim) / 448
    return {"weight": (tensor.float() / scale).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def one_block_per_stack(tensor):
    parts = fp8.encode(tensor.reshape(-1, tensor.shape[-1]))
    return {"weight": parts["weight"].reshape(tensor.shape), "weight_scale_inv": parts["weight_scale_inv"]}


def scribbling(tensor):
    parts = fp8.encode(tensor)
    tensor.detach().mul_(0.5)
    return parts


def stride_bound(tensor):
    noise = 1.0 if tensor.is_contiguous() else 1.01
    return fp8.encode(tensor * noise)


def lenient(tensor):
    return fp8.encode(tensor.to(torch.float32).nan_to_num(0.0, 0.0, 0.0))


def truncated(parts, *, dtype=torch.float32):
    return (fp8.decode(parts) * 0.9).to(dtype)


@pytest.mark.parametrize(
    ("check", "replaced"),
    [
        ("protocol", {"name": "FP8 block"}),
        ("parts_are_plain_tensors", {"encode": lambda t: {"weight": t.to(torch.bfloat16)}}),
        ("parts_are_plain_tensors", {"encode": lambda t: {"weight": fp8.encode(t)["weight"].transpose(-1, -2)}}),
        ("size_is_known_in_advance", {"nbytes": lambda shape: 2 * torch.Size(shape).numel()}),
        ("shape_and_dtype_survive", {"decode": lambda parts, dtype=None: fp8.decode(parts)}),
        ("shape_and_dtype_survive", {"decode": lambda parts, dtype=None: fp8.decode(parts, dtype=dtype).flatten()}),
        ("error_is_bounded", {"decode": truncated}),
        ("zeros_stay_zero", {"encode": plain_division, "decode": lambda p, dtype=None: p["weight"].float()}),
        ("encoding_is_a_function_of_the_values", {"encode": scribbling}),
        ("encoding_is_a_function_of_the_values", {"encode": stride_bound}),
        ("stacked_experts_are_independent", {"encode": one_block_per_stack}),
        ("fake_quantize_is_the_round_trip", {"fake_quantize": lambda t: t + (fp8.fake_quantize(t) - t).detach()}),
        ("gradient_passes_straight_through", {"fake_quantize": lambda t: fp8.fake_quantize(t) * 1.0 + t * 0.5}),
        ("gradient_passes_straight_through", {"fake_quantize": lambda t: fp8.fake_quantize(t.detach()) + 0 * t}),
        ("non_finite_input_is_refused", {"encode": lenient}),
        ("foreign_input_is_refused", {"encode": lenient}),
        ("foreign_input_is_refused", {"decode": lambda parts, dtype=torch.float32: parts["weight"].to(dtype)}),
        ("config_is_json", {"quantization_config": lambda ignored: {"quant_method": "fp8", "ignored": set(ignored)}}),
        ("config_is_json", {"quantization_config": lambda ignored: {"quant_method": "fp8"}}),
    ],
)
def test_a_wrong_format_fails_the_check_written_for_it(check, replaced):
    with pytest.raises(ConformanceError, match=rf"(?m)^{check}: "):
        examine(Candidate(Wrong(replaced), fp8_bound))


def test_examine_passes_a_format_that_conforms():
    examine(Candidate(FP8Block(), fp8_bound))


def test_same_parts_tells_bits_names_and_dtypes_apart():
    zero, negative = torch.zeros(2), -torch.zeros(2)
    assert same_parts({"weight": zero}, {"weight": zero.clone()})
    assert not same_parts({"weight": zero}, {"weight": negative})
    assert not same_parts({"weight": zero}, {"other": zero})
    assert not same_parts({"weight": zero}, {"weight": zero.half()})


def test_lookup_finds_every_format_and_names_the_nearest_otherwise():
    for name, format in FORMATS.items():
        assert get_format(name) is format and format.name == name
    with pytest.raises(FormatError, match=r"unknown format 'fp8_blok': did you mean 'fp8_block'\? .*bf16, fp8_block"):
        get_format("fp8_blok")
    with pytest.raises(FormatError, match=r"unknown format 'q': the formats are bf16, fp8_block"):
        get_format("q")


def test_importing_needs_torch_alone():
    """Neither the door nor the examiner pulls in pytest, transformers, another miles package or CUDA."""
    program = (
        "import sys, torch, miles_precision, miles_precision.conformance;"
        "print([m for m in ('pytest', 'transformers', 'miles_core', 'triton_kernels') if m in sys.modules],"
        "torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
