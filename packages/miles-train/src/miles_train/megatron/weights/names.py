"""From the names of this rank's tensors to those of the unsharded whole model, which weight tables speak.

A rank counts from 0 what it holds: the layers of a pipeline chunk, the experts of its expert-parallel rank. And some
tensors lie in several chunks under several names.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from miles_train.megatron.upstream import parallel_state
from miles_train.megatron.weights.convert import model_tensors

_EMBEDDING = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"
_LAYER = re.compile(r"((?:decoder|mtp)\.layers)\.(\d+)\.")
_SEQUENTIAL = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(.*)")
# Transformer Engine's grouped linears hold the tensors of all local experts, numbered.
_GROUPED = re.compile(r"(.*\.experts)\.(linear_fc[12])\.(weight|bias)(\d+)")


def local_tensors(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield what of this rank's chunks lies in a checkpoint: parameters and persistent buffers, by global name.

    A name comes twice where a rank holds two copies of one tensor, as it may of tied embeddings.

    Args:
        chunks: Megatron models, unwrapped.
    """
    for chunk in chunks:
        for name, tensor in model_tensors(chunk).items():
            yield global_name(chunk, name), tensor


def global_tensors(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """`local_tensors` by name; of copies, which are equal, the first."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in local_tensors(chunks):
        tensors.setdefault(name, tensor)
    return tensors


def global_name(chunk: nn.Module, name: str) -> str:
    """The name in the unsharded whole model of a parameter of one chunk.

    - `decoder.layers.0.` of a later pipeline stage or virtual chunk: the layer's number over the whole model.
    - `experts.local_experts.0.`: the expert's number over the whole layer.
    - `experts.linear_fc1.weight0` of grouped experts: `experts.local_experts.{expert}.linear_fc1.weight`.
    - `output_layer.weight` where embeddings are tied: the last stage's copy of the embedding.
    """
    if name == _HEAD and getattr(chunk, "share_embeddings_and_output_weights", False):
        return _EMBEDDING
    found = _SEQUENTIAL.fullmatch(name)
    if found:
        experts, local, rest = found.groups()
        name = f"{experts}.local_experts.{_expert(chunk, experts, int(local))}.{rest}"
    found = _GROUPED.fullmatch(name)
    if found:
        experts, linear, kind, local = found.groups()
        name = f"{experts}.local_experts.{_expert(chunk, experts, int(local))}.{linear}.{kind}"
    found = _LAYER.match(name)
    if found:
        layer: Any = chunk.get_submodule(f"{found[1]}.{found[2]}")
        name = f"{found[1]}.{layer.layer_number - 1}.{name[found.end() :]}"
    return name


def _expert(chunk: nn.Module, experts: str, local: int) -> int:
    module: Any = chunk.get_submodule(experts)
    return parallel_state.get_expert_model_parallel_rank() * module.num_local_experts + local
