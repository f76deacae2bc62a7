"""Learning from samples: Megatron models, weight tables, checkpoints and the training step.

`Trainer` is what an application drives. `miles_train.megatron.MegatronTrainer` is one; `miles_train.conformance`
examines any.
"""

from miles_train.errors import CheckpointError, NonFiniteError
from miles_train.trainer import Trainer

__all__ = ["CheckpointError", "NonFiniteError", "Trainer"]
