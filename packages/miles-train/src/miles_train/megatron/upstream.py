"""Everything this package uses of Megatron-Core, by name: the one place that imports it."""

import miles_train.megatron._environment  # noqa: F401  # before any import of megatron

# isort: split
from importlib.metadata import version

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE as HAVE_TRANSFORMER_ENGINE
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt import gpt_model
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.gated_delta_net import GatedDeltaNet as StockGatedDeltaNet
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.ssm.gated_delta_net import common as gated_delta_net_common
from megatron.core.ssm.gated_delta_net import gdn as gated_delta_net
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel import mappings as tensor_parallel_mappings
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention
from megatron.core.transformer.multi_token_prediction import (
    MTPLossAutoScaler,
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_viewless_tensor
from megatron.training import arguments as training_arguments
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

MEGATRON_VERSION = version("megatron-core")

__all__ = [
    "HAVE_TRANSFORMER_ENGINE",
    "MEGATRON_VERSION",
    "AttnMaskType",
    "BackendSpecProvider",
    "ChainedOptimizer",
    "CheckpointingException",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedOptimizer",
    "Float16Module",
    "GPTModel",
    "GatedDeltaNetSubmodules",
    "IdentityOp",
    "LocalSpecProvider",
    "MLASelfAttentionSubmodules",
    "MTPLossAutoScaler",
    "MegatronModule",
    "MegatronOptimizer",
    "MoELayer",
    "ModuleSpec",
    "MultiLatentAttention",
    "MultiTokenPredictionBlock",
    "MultiTokenPredictionBlockSubmodules",
    "MultiTokenPredictionLayer",
    "MultiTokenPredictionLayerSubmodules",
    "OptimizerParamScheduler",
    "PackedSeqParams",
    "RowParallelLinear",
    "SelfAttention",
    "SelfAttentionSubmodules",
    "ShardedObject",
    "StockGatedDeltaNet",
    "TESpecProvider",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "TransformerLayer",
    "TransformerLayerSubmodules",
    "add_megatron_arguments",
    "copy_to_tensor_model_parallel_region",
    "core_transformer_config_from_args",
    "dist_checkpointing",
    "filesystem_async",
    "finalize_model_grads",
    "gated_delta_net",
    "gated_delta_net_common",
    "gather_from_sequence_parallel_region",
    "get_bias_dropout_add",
    "get_cuda_rng_tracker",
    "get_forward_backward_func",
    "get_megatron_ddp_config",
    "get_megatron_optimizer",
    "get_megatron_optimizer_config",
    "get_mlp_module_spec_for_backend",
    "get_moe_module_spec_for_backend",
    "get_num_layers_to_build",
    "get_transformer_layer_offset",
    "gpt_model",
    "make_sharded_tensors_for_checkpoint",
    "make_viewless_tensor",
    "model_parallel_cuda_manual_seed",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "save_integrity_manifest",
    "tensor_parallel_mappings",
    "tensor_parallel_random",
    "token_dispatcher",
    "training_arguments",
    "validate_args",
]
