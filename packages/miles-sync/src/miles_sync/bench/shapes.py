"""Models to measure with: by name, by a Hugging Face config, or by the headers of a checkpoint's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from miles_sync.manifest import DTYPES, TensorMeta
from miles_sync.tensorfile import Checkpoint


@dataclass(frozen=True)
class Decoder:
    """A decoder of the usual kind, in bfloat16; `experts` 0 is dense, `inter` is of one expert otherwise."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inter: int
    vocab: int
    experts: int = 0
    head_dim: int = 128
    tied: bool = False
    norms: bool = True
    bias: bool = False

    def tensors(self) -> list[TensorMeta]:
        """What its checkpoint holds, as Hugging Face names it."""
        found = [("model.embed_tokens.weight", (self.vocab, self.hidden)), ("model.norm.weight", (self.hidden,))]
        if not self.tied:
            found.append(("lm_head.weight", (self.vocab, self.hidden)))
        for layer in range(self.layers):
            found += self._layer(f"model.layers.{layer}")
        return [TensorMeta(name, "bfloat16", shape) for name, shape in found]

    def _layer(self, at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        rows = {"q": self.heads * self.head_dim, "k": self.kv_heads * self.head_dim, "v": self.kv_heads * self.head_dim}
        for name, count in rows.items():
            yield f"{at}.self_attn.{name}_proj.weight", (count, self.hidden)
            if self.bias:
                yield f"{at}.self_attn.{name}_proj.bias", (count,)
        yield f"{at}.self_attn.o_proj.weight", (self.hidden, rows["q"])
        if self.norms:
            yield from ((f"{at}.self_attn.{name}_norm.weight", (self.head_dim,)) for name in "qk")
        yield from ((f"{at}.{name}_layernorm.weight", (self.hidden,)) for name in ("input", "post_attention"))
        if self.experts:
            yield f"{at}.mlp.gate.weight", (self.experts, self.hidden)
        for place in [f"{at}.mlp.experts.{index}" for index in range(self.experts)] or [f"{at}.mlp"]:
            yield from ((f"{place}.{name}_proj.weight", (self.inter, self.hidden)) for name in ("gate", "up"))
            yield f"{place}.down_proj.weight", (self.hidden, self.inter)


_QWEN3 = {
    "0.6b": Decoder(28, 1024, 16, 8, 3072, 151936, tied=True),
    "1.7b": Decoder(28, 2048, 16, 8, 6144, 151936, tied=True),
    "4b": Decoder(36, 2560, 32, 8, 9728, 151936, tied=True),
    "8b": Decoder(36, 4096, 32, 8, 12288, 151936),
    "14b": Decoder(40, 5120, 40, 8, 17408, 151936),
    "32b": Decoder(64, 5120, 64, 8, 25600, 151936),
    "30b-a3b": Decoder(48, 2048, 32, 4, 768, 151936, experts=128),
    "235b-a22b": Decoder(94, 4096, 64, 4, 1536, 151936, experts=128),
}
NAMED = _QWEN3 | {
    "tiny": Decoder(2, 256, 4, 2, 512, 9000),
    "tiny-moe": Decoder(2, 256, 4, 2, 64, 9000, experts=8),
}
"""The Qwen3 family (8b: 399 tensors, 16.4 GB; 30b-a3b: 18,867 tensors, 61.1 GB), and two small ones for trials."""


def tensors_of(model: str, layers: int | None = None) -> list[TensorMeta]:
    """The tensors of a model.

    Args:
        model: A key of `NAMED`, a directory with safetensors files or a config.json, or such a config's path.
        layers: Leave the model fewer layers, so that it fits; not for a checkpoint.

    Raises:
        ValueError: It is none of these, or a config of another architecture than this builds.
    """
    path = Path(model)
    if model.lower() in NAMED:
        decoder = NAMED[model.lower()]
    elif path.is_dir() and any(path.glob("*.safetensors")):
        if layers is not None:
            raise ValueError(f"layers={layers}: {model} is a checkpoint, which is taken whole")
        return list(Checkpoint(path).metadata())
    elif path.is_file() or (path / "config.json").is_file():
        decoder = _from_config(json.loads((path if path.is_file() else path / "config.json").read_text()))
    else:
        raise ValueError(
            f"model={model!r} must be one of {', '.join(NAMED)}, a config.json or a checkpoint's directory"
        )
    return (decoder if layers is None else replace(decoder, layers=layers)).tensors()


def _from_config(config: Mapping[str, Any]) -> Decoder:
    """Read a Hugging Face config. Raises `ValueError` where it has what a plain decoder has not."""
    odd = [
        key
        for key in ("kv_lora_rank", "linear_num_key_heads", "first_k_dense_replace", "text_config")
        if config.get(key)
    ]
    if odd:
        raise ValueError(f"config with {', '.join(odd)}: only a checkpoint's files say which tensors that makes")
    try:
        experts = next((config[k] for k in ("num_experts", "num_local_experts") if config.get(k)), 0)
        kind, heads = str(config.get("model_type", "")), config["num_attention_heads"]
        return Decoder(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            inter=(config.get("moe_intermediate_size") or config["intermediate_size"])
            if experts
            else config["intermediate_size"],
            vocab=config["vocab_size"],
            experts=experts,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tied=bool(config.get("tie_word_embeddings")),
            norms=kind.startswith("qwen3"),
            bias=bool(config.get("attention_bias", kind.startswith("qwen2"))),
        )
    except KeyError as error:
        raise ValueError(f"config without {error}: give a checkpoint's directory") from error


def random_tensors(metas: Sequence[TensorMeta], device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """Tensors with random bits, each an allocation of its own."""
    generator = torch.Generator(device).manual_seed(seed)
    return {
        meta.name: fill(torch.empty(meta.shape, dtype=DTYPES[meta.dtype], device=device), generator) for meta in metas
    }


def fill(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Give a tensor random bits (0 and 1 only, if it is boolean)."""
    if tensor.dtype == torch.bool:
        return tensor.random_(0, 2, generator=generator)
    words = _words(tensor)
    bits = 8 * words.element_size() - (words.dtype == torch.int64)  # random_ of int64 leaves the sign alone
    words.random_(0, 2**bits if bits < 63 else None, generator=generator)
    return tensor


def change(tensors: Mapping[str, torch.Tensor], version: int) -> None:
    """Change every element, as a training step would."""
    for tensor in tensors.values():
        if tensor.dtype == torch.bool:
            tensor.logical_not_()
        else:
            words = _words(tensor)
            byte = (2 * version + 1) % 127
            words.bitwise_xor_(int.from_bytes(bytes([byte]) * words.element_size(), "little"))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, by eight where they divide: a multiple faster to fill."""
    flat = tensor.view(-1).view(torch.uint8)
    return flat.view(torch.int64) if flat.numel() % 8 == 0 and flat.data_ptr() % 8 == 0 else flat
