"""Configs of the families with grouped-query attention: some for every test run, many for the long one."""

BASE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **values}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
YARN_MSCALE = rope(
    "yarn",
    factor=40.0,
    original_max_position_embeddings=16,
    mscale=1.0,
    mscale_all_dim=0.4,
    beta_fast=8,
    beta_slow=2,
    truncate=False,
)
LONGROPE = rope(
    "longrope", original_max_position_embeddings=48, short_factor=[1.0, 1.3, 1.6, 1.9], long_factor=[2.0] * 4
)
