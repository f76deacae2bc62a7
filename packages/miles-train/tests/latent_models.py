"""Tiny models with latent attention for the tests, and directories made of others."""

import json

from safetensors.torch import load_file, save_file

BASE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 16,
}
# Few heads would leave many scores at 0 after the ReLU, and equal scores are a game of chance.
INDEXER = {"index_topk": 5, "index_head_dim": 12, "index_n_heads": 8}


def derived(path, out, config, tensors=None, prefix=""):
    """A directory like another one, with config changes, more tensors, and a prefix before the others' names."""
    out.mkdir()
    stored = {prefix + name: tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file({**stored, **(tensors or {})}, out / "model.safetensors", metadata={"format": "pt"})
    before = json.loads((path / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config(before)))
