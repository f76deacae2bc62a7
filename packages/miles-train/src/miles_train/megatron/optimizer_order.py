"""Where Megatron's distributed optimizer keeps each parameter, in a model of mixed dtypes.

`DistributedOptimizer` (0.19.2) numbers the parameters of a group in the order of its gradient buffers, but hands them
to the inner optimizer with those in float32 first. Once some stay in float32 beside a narrower model, as the decays of
gated DeltaNet do, saving a checkpoint takes the state of other parameters: it fails where their sizes differ, and
exchanges them in silence where they do not. `number_as_stored` puts the numbers right.
"""

import torch

from miles_train.megatron.resume_fixes import distributed_parts
from miles_train.megatron.upstream import MegatronOptimizer


def number_as_stored(optimizer: MegatronOptimizer) -> None:
    """Number every parameter by its place in the inner optimizer; changes nothing where all have one dtype."""
    for part in distributed_parts(optimizer):
        for index, group in enumerate(part.opt_group_ranges):
            stored = sorted(group["params"], key=lambda parameter: parameter.dtype != torch.float32)  # stable
            for order, parameter in enumerate(stored):
                part.model_param_group_index_map[parameter] = index, order
