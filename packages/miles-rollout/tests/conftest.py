"""A tiny model on disk, and an engine in plain numpy for what needs no SGLang."""

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from miles_core.types import VersionSpan
from miles_rollout.engine import Completion, SamplingParams
from miles_rollout.errors import EngineError, EngineUnavailable

sys.path.insert(0, str(Path(__file__).parent))  # for the modules that these tests share

CHARACTERS = "0123456789=ab"
EOS = len(CHARACTERS)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": EOS,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of 80 thousand parameters over 16 characters."""
    folder = tmp_path_factory.mktemp("tiny-model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    save_file(random_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    write_character_tokenizer(folder)
    return folder


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    hidden, inner, queries, keys, head = 64, 128, 64, 32, 16

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 0.2, (rows, columns)).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(16, hidden), "model.norm.weight": norm(hidden)}
    for index in range(2):
        layer = f"model.layers.{index}."
        weights |= {
            layer + "input_layernorm.weight": norm(hidden),
            layer + "post_attention_layernorm.weight": norm(hidden),
            layer + "self_attn.q_proj.weight": matrix(queries, hidden),
            layer + "self_attn.k_proj.weight": matrix(keys, hidden),
            layer + "self_attn.v_proj.weight": matrix(keys, hidden),
            layer + "self_attn.o_proj.weight": matrix(hidden, queries),
            layer + "self_attn.q_norm.weight": norm(head),
            layer + "self_attn.k_norm.weight": norm(head),
            layer + "mlp.gate_proj.weight": matrix(inner, hidden),
            layer + "mlp.up_proj.weight": matrix(inner, hidden),
            layer + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    return weights


def write_character_tokenizer(folder: Path) -> None:
    vocab = {character: number for number, character in enumerate([*CHARACTERS, "<eos>", "<pad>", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<eos>", "<pad>", "<unk>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, **special})
    )


@pytest.fixture
def numpy_engine() -> "NumpyEngine":
    return NumpyEngine()


class NumpyEngine:
    """A model whose next token depends on the one before alone. Honest: it passes the conformance suite."""

    vocab_size, context_length = 16, 64

    def __init__(self) -> None:
        logits = np.random.default_rng(0).normal(0, 1, (self.vocab_size, self.vocab_size))
        self.logits = logits.astype(np.float32)
        self.version = 0
        self.running = asyncio.Event()
        self.running.set()
        self.aborted = 0
        self.closed = False

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        num_samples: int,
        *,
        seeds: Sequence[int] | None = None,
        namespace: str = "",
    ) -> list[Completion]:
        if seeds is not None and len(seeds) != num_samples:
            raise ValueError("a seed for each sample")
        if not input_ids or len(input_ids) > self.context_length:
            raise EngineError("request refused", f"{len(input_ids)} tokens")
        aborted = self.aborted
        await self.running.wait()
        each = range(num_samples) if seeds is None else seeds
        completions = [self._complete(input_ids[-1], sampling, seed) for seed in each]
        await asyncio.sleep(0.001 * sampling.max_new_tokens)
        if self.aborted > aborted:
            raise EngineUnavailable("request aborted")
        return completions

    def _complete(self, last: int, sampling: SamplingParams, seed: int) -> Completion:
        rng = np.random.default_rng(seed)
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < sampling.max_new_tokens:
            logits = self.logits[last] / (sampling.temperature or 1.0)
            all_logprobs = logits - np.logaddexp.reduce(logits)
            order = np.argsort(-all_logprobs)
            above = np.cumsum(np.exp(all_logprobs[order])) - np.exp(all_logprobs[order])
            kept = order[above < sampling.top_p][: sampling.top_k if sampling.top_k > 0 else None]
            noise = rng.gumbel(size=self.vocab_size) if sampling.temperature else np.zeros(self.vocab_size)
            last = int(kept[np.argmax((all_logprobs + noise)[kept])])
            tokens.append(last)
            logprobs.append(float(all_logprobs[last]))
            if last in sampling.stop_token_ids:
                break
        return Completion(
            np.asarray(tokens, np.int32),
            np.asarray(logprobs, np.float32),
            "stop" if last in sampling.stop_token_ids else "length",
            (VersionSpan(0, len(tokens), self.version),),
        )

    async def health(self) -> None:
        pass

    async def weight_version(self) -> int:
        return self.version

    async def flush_cache(self) -> None:
        pass

    async def pause(self, mode: str = "abort") -> None:
        self.aborted += mode == "abort"
        self.running.clear()

    async def resume(self) -> None:
        self.running.set()

    async def close(self) -> None:
        self.closed = True
