"""Models and batches for `gpu_step`: shapes of real models, random weights, no network."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from miles_core.types import Batch
from miles_train.megatron.weights import TABLES

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 1000000.0,
    "attention_bias": False,
}
QWEN3_0_6B = {
    **_QWEN3,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its Hugging Face name."""
    return dict(TABLES[config["architectures"][0]](config, ()).shapes())


def num_parameters(config: dict[str, Any]) -> int:
    """Weights of the model."""
    return sum(math.prod(shape) for shape in shapes_of(config).values())


def make_model(path: Path, config: dict[str, Any]) -> Path:
    """Write a model whose weights are random bfloat16 numbers; its logits have a standard deviation of about 1.5."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, shape in shapes_of(config).items():
        random = torch.randn(shape, generator=generator, device=device)
        scale = 0.05 if "embed" in name or "lm_head" in name else 0.02
        weights[name] = (1 + 0.1 * random if len(shape) == 1 else scale * random).bfloat16().cpu()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def make_empty_model(path: Path, config: dict[str, Any]) -> Path:
    """Write a model of zeros that take no disk: a file with a hole. `randomise` makes numbers of them."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes_of(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (path / "config.json").write_text(json.dumps(config))
    return path


@torch.no_grad()
def randomise(trainer: Any) -> None:
    """Fill a trainer's weights: products of zeros run faster than products of numbers."""
    torch.manual_seed(0)
    learner = trainer._learner
    for chunk in learner.chunks:
        for parameter in chunk.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
    learner.optimizer.reload_model_params()


def make_batch(lengths: "np.ndarray[Any, Any]", vocab_size: int, seed: int = 0) -> Batch:
    """Random samples of which every token but the first is trained."""
    rng = np.random.default_rng(seed)
    total = int(lengths.sum())
    mask = np.ones(total, np.bool_)
    mask[np.cumsum(lengths) - lengths] = False
    return Batch(
        tokens=rng.integers(0, vocab_size, total).astype(np.int32),
        lengths=lengths.astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.full(total, -12.0, np.float32),
        advantages=(rng.normal(size=total) * mask).astype(np.float32),
        loss_weights=(mask / mask.sum()).astype(np.float32),
        rewards=np.zeros(len(lengths), np.float32),
        versions=np.zeros(len(lengths), np.int64),
        group_index=np.arange(len(lengths), dtype=np.int32),
        num_loss_tokens=int(mask.sum()),
        num_samples=len(lengths),
    )
