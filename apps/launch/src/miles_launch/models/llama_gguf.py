"""A GGUF file of the Llama family, as a Hugging Face directory in bfloat16.

What GGUF stores differently, and what is done about it:

- llama.cpp rotates neighbouring channels, transformers rotates channels half a head apart. The rows of queries and keys
  are therefore stored interleaved (`permute` in llama.cpp's convert_hf_to_gguf.py); their order is put back here.
- Matrices are quantised in blocks. They are dequantised, and rounded once, to bfloat16.
- Floats lost their decimal form: an epsilon of 1e-05 reads 9.999999747378752e-06. They are rounded to seven digits.

Needs gguf, safetensors and tokenizers alone: no version of transformers has a say in the result.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from miles_core import InputError
from miles_launch.models._directory import make_directory, write_json

Fields = Mapping[str, Any]

# llama.cpp's names of a layer's tensors, and transformers'.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert_gguf(gguf_file: Path, path: str | Path) -> None:
    """Write a Llama with SmolLM's tokenizer; a directory that is there already stays as it is.

    Args:
        gguf_file: the file, in any quantisation that the gguf package can undo.
        path: the directory to make.

    Raises:
        InputError: the file holds another architecture or tokenizer, or the directory cannot be written.
    """
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, known in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        if fields.get(name) != known:
            raise InputError(
                f"{name} of {gguf_file}", fields.get(name), f"only {known!r} can be converted", "Use another file."
            )

    def write(folder: Path) -> None:
        weights = dict(_weights(reader, fields))
        write_json(folder / "config.json", _config(fields, tied="lm_head.weight" not in weights))
        write_json(folder / "generation_config.json", _special_ids(fields))
        write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
        _tokenizer(fields).save(str(folder / "tokenizer.json"))
        (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))

    make_directory(Path(path), write)


def _weights(reader: gguf.GGUFReader, fields: Fields) -> Iterator[tuple[str, Tensor]]:
    interleaved = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    for stored in reader.tensors:
        values = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type)).bfloat16()
        stem, _, kind = stored.name.rpartition(".")
        if not stem.startswith("blk."):
            yield f"{OTHER_NAMES[stem]}.{kind}", values
            continue
        _, layer, part = stem.split(".")
        if part in interleaved:
            values = _halves_of_heads(values, interleaved[part])
        yield f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}", values


def _halves_of_heads(rows: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * channels, columns]: pairs of neighbours become halves of a head."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def _special_ids(fields: Fields) -> dict[str, int]:
    return {
        f"{short}_token_id": fields[f"tokenizer.ggml.{long}_token_id"]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def _config(fields: Fields, *, tied: bool) -> dict[str, Any]:
    num_heads, hidden_size = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_special_ids(fields),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": _decimal(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_scaling": None,
        "rope_theta": _decimal(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _decimal(value: float) -> float:
    return float(f"{value:.7g}")


def _tokenizer(fields: Fields) -> Tokenizer:
    """SmolLM's: every digit alone, then byte-level byte-pair encoding with GPT-2's regular expression.

    llama.cpp does the same for `tokenizer.ggml.pre = "smollm"` (llama-vocab.cpp). transformers leaves out the digits
    when it reads a GGUF, and so cuts two line breaks before a digit unlike the model's own tokenizer.json.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _tokenizer_config(fields: Fields) -> dict[str, Any]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{short}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]] for short, long in named.items()},
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
