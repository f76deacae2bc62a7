"""Stock Megatron on Transformer Engine with its command line's defaults: what `gpu_step` measures the trainer against.

Megatron's own layer spec, loss and distributed optimizer, packed sequences, logits in full, one micro-batch a step.
`gradient_accumulation_fusion` is off, because the output layer then needs Apex.
"""

from typing import Any

import numpy as np
import torch
from torch import distributed

from miles_train.megatron.upstream import (
    DistributedDataParallel,
    DistributedOptimizer,
    Float16Module,
    GPTModel,
    PackedSeqParams,
    TransformerConfig,
    finalize_model_grads,
    get_megatron_optimizer,
    model_parallel_cuda_manual_seed,
    parallel_state,
)


class StockModel:
    """A model in gradient buffers, its optimizer, and one batch."""

    def __init__(self, config: dict[str, Any], lengths: "np.ndarray[Any, Any]"):
        """Start the process group and build everything.

        Args:
            config: of a dense Qwen3.
            lengths: tokens of each packed sample.
        """
        from megatron.core.distributed import DistributedDataParallelConfig  # noqa: PLC0415  # after upstream
        from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: PLC0415
            get_gpt_layer_with_transformer_engine_spec,
        )
        from megatron.core.optimizer import OptimizerConfig  # noqa: PLC0415

        store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # public by its documentation
        distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
        transformer = _transformer(config)
        model = GPTModel(
            transformer,
            get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
            vocab_size=config["vocab_size"],
            max_sequence_length=config["max_position_embeddings"],
            position_embedding_type="rope",
            rotary_base=int(config["rope_theta"]),
            share_embeddings_and_output_weights=config["tie_word_embeddings"],
        ).cuda()
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        layout = DistributedOptimizer.compute_full_param_layout(list(model.parameters()), None, 1, ddp)
        self.model = DistributedDataParallel(
            transformer, ddp, Float16Module(transformer, model), full_param_layout=layout
        )
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=1e-8,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            clip_grad=1.0,
        )
        self.optimizer = get_megatron_optimizer(optimizer, [self.model], use_gloo_process_groups=False)
        self._set_batch(config["vocab_size"], lengths)

    def _set_batch(self, vocab_size: int, lengths: "np.ndarray[Any, Any]") -> None:
        ends = torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).cuda()
        longest = int(lengths.max())
        self.packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        self.tokens = torch.randint(vocab_size, (1, int(lengths.sum())), device="cuda")

    def step(self) -> None:
        """Forward, backward, update."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.model(
            self.tokens,
            torch.zeros_like(self.tokens),
            None,
            labels=self.tokens.roll(-1, dims=1),
            packed_seq_params=self.packed,
        )
        losses.mean().backward()
        finalize_model_grads([self.model], None)
        self.optimizer.step()

    def close(self) -> None:
        """Leave the process group."""
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()


def _transformer(config: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        ffn_hidden_size=config["intermediate_size"],
        normalization="RMSNorm",
        layernorm_epsilon=config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        transformer_impl="transformer_engine",
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=True,
        apply_rope_fusion=True,
    )
