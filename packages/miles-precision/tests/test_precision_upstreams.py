"""The reference beside the block quantisers of transformers and compressed-tensors, on CPU."""

import json
import types

import pytest
import torch
from safetensors.torch import save_file

from miles_precision import FP8Block

torch.set_num_threads(1)

FP8 = FP8Block()


def trained(*shape, seed=0, dtype=torch.float32):
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 200)])
def test_compressed_tensors_gives_the_same_bits(shape, dtype):
    """Its scale, codes and dequantised values for a 128x128 block scheme, ragged edges included."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    scheme = quantization.QuantizationArgs(
        num_bits=8, type="float", strategy="block", block_structure=[128, 128], symmetric=True
    )
    weight = trained(*shape, dtype=dtype)
    parts = FP8.encode(weight)
    scale = parts["weight_scale_inv"]
    zero = torch.zeros_like(scale)
    codes = forward.quantize(weight.float(), scale, zero, scheme, dtype=torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), parts["weight"].view(torch.uint8))
    back = forward.dequantize(codes, scale, zero, scheme, dtype=torch.float32)
    assert torch.equal(back, FP8.decode(parts))


def test_compressed_tensors_computes_the_same_scale():
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationArgs(
        num_bits=8, type="float", strategy="block", block_structure=[128, 128], symmetric=True
    )
    weight = trained(256, 128)
    blocks = weight.reshape(2, 128, 1, 128)
    scale, _ = helpers.calculate_qparams(blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3)), scheme)
    assert torch.equal(scale, FP8.encode(weight)["weight_scale_inv"])


@pytest.mark.parametrize("shape", [(128, 256), (3, 256, 128)])
def test_transformers_quantiser_agrees_within_its_second_rounding(shape):
    """It multiplies by the rounded inverse 448 / amax where the reference divides: one ulp of scale, rarely a code."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = types.SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantiser = types.SimpleNamespace(quantization_config=config)
    weight = trained(*shape)
    theirs = fp8.Fp8Quantize(quantiser).convert({"m.weight": weight})
    ours = FP8.encode(weight)
    ulps = theirs["m.weight_scale_inv"].view(torch.int32) - ours["weight_scale_inv"].view(torch.int32)
    assert ulps.abs().max() <= 1
    other = theirs["m.weight"].view(torch.uint8) != ours["weight"].view(torch.uint8)
    assert other.double().mean() < 1e-4

    back = fp8.Fp8Dequantize(quantiser).convert(
        {"weight$": ours["weight"], "weight_scale_inv": ours["weight_scale_inv"]}
    )
    assert torch.equal(back["weight"], FP8.decode(ours))


def test_transformers_loads_a_checkpoint_made_of_the_parts(tmp_path):
    """A Qwen3 directory in FP8, read by from_pretrained on CPU, has exactly the fake-quantised weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ignored = ["lm_head", *(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")]
    tensors = {}
    for name, weight in model.state_dict().items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and module not in ignored:
            tensors |= {f"{module}.{part}": tensor for part, tensor in FP8.encode(weight).items()}
            weight.copy_(FP8.fake_quantize(weight))
        else:
            tensors[name] = weight
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    published = {**config.to_dict(), "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    published["quantization_config"] = FP8.quantization_config(ignored)
    (tmp_path / "config.json").write_text(json.dumps(published))

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()

    expected = model.state_dict()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected[name]), name
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
