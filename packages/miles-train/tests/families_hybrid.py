"""Configs of the families of gated DeltaNet and gated attention: some for every test run, many for the long one."""

LINEAR, FULL = "linear_attention", "full_attention"
BASE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 64,
}
DENSE = {"intermediate_size": 48}
EXPERTS = {
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def layers(pattern):
    """A layer per letter: "l" for DeltaNet, "f" for attention."""
    kinds = {"l": LINEAR, "f": FULL}
    return {"layer_types": [kinds[letter] for letter in pattern], "num_hidden_layers": len(pattern)}


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **values}}


# Attention and DeltaNet of odd sizes, and of sizes with nothing to share; for every family.
COMMON = {
    "odd": {
        **layers("llf"),
        "hidden_size": 30,
        "head_dim": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "linear_key_head_dim": 5,
        "linear_value_head_dim": 7,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 9,
        "linear_conv_kernel_dim": 3,
    },
    "as-many-keys-as-values": {
        **layers("lf"),
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 4,
    },
    "one-key-head": {**layers("fl"), "linear_num_key_heads": 1, "linear_num_value_heads": 6, "num_key_value_heads": 1},
    "no-convolution": {**layers("lf"), "linear_conv_kernel_dim": 1},
    "every-second": {"num_hidden_layers": 5, "full_attention_interval": 2},
    # Transformers' cache cannot be asked for the length of what it does not hold.
    "attention-alone": {**layers("ff"), "use_cache": False},
    "delta-net-alone": {**layers("lll"), "use_cache": False},
    "biases": {**layers("fl"), "attention_bias": True},
    "tied": {**layers("lf"), "tie_word_embeddings": True},
    "large-epsilon": {**layers("lf"), "rms_norm_eps": 0.01},
    "half-of-channels": {**layers("lf"), **rope("default", partial_rotary_factor=0.5)},
    "all-channels": {**layers("lf"), **rope("default", partial_rotary_factor=1.0)},
    "odd-share-of-channels": {**layers("lf"), "head_dim": 12},
    "one-pair-of-channels": {**layers("lf"), "head_dim": 4},
    "linear-rope": {**layers("lf"), **rope("linear", factor=3.0)},
    "yarn": {**layers("lf"), **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    # Transformers drops the share inside for all but the default kind: 0.25 counts, that of the classes.
    "yarn-and-two-shares": {
        **layers("lf"),
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, partial_rotary_factor=0.5),
    },
    "yarn-of-half": {
        **layers("lf"),
        "partial_rotary_factor": 0.5,
        **rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.3),
    },
}
ROUTING = {
    "one-chosen": {**layers("lf"), "num_experts_per_tok": 1},
    "all-chosen": {**layers("lf"), "num_experts": 5, "num_experts_per_tok": 5},
    "odd-experts": {
        **layers("lf"),
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 5,
        "shared_expert_intermediate_size": 9,
    },
}
