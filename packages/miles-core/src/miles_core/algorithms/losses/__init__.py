"""Losses in torch: per-token values, never reduced here.

A loss sees one micro-batch as flat columns and returns one number per token; the trainer multiplies by the batch's
`loss_weights` (miles_core.batching decides the reduction) and sums. So the same loss is right under packing, any split
into micro-batches, context and data parallelism. Each is one function, or one frozen dataclass of its parameters, in
one file.
"""

from miles_core.algorithms import _torch  # noqa: F401  # pyright: ignore[reportUnusedImport]  # first: names the extra
from miles_core.algorithms.losses.cispo import CISPO
from miles_core.algorithms.losses.distillation import Distillation
from miles_core.algorithms.losses.dpo import DPO
from miles_core.algorithms.losses.gspo import GSPO
from miles_core.algorithms.losses.inputs import Correction, Loss, LossInputs, Scored
from miles_core.algorithms.losses.kl_term import KLTerm
from miles_core.algorithms.losses.objective import Objective
from miles_core.algorithms.losses.policy_gradient import policy_gradient
from miles_core.algorithms.losses.ppo_clip import PPOClip
from miles_core.algorithms.losses.sapo import SAPO
from miles_core.algorithms.losses.sft import sft
from miles_core.algorithms.losses.value_clip import ValueClip

__all__ = [  # noqa: RUF022 (grouped by subject)
    # words
    "Correction",
    "Loss",
    "LossInputs",
    "Scored",
    # policy
    "CISPO",
    "GSPO",
    "PPOClip",
    "SAPO",
    "policy_gradient",
    # other teachers than a reward
    "DPO",
    "Distillation",
    "sft",
    # critic
    "ValueClip",
    # composition
    "KLTerm",
    "Objective",
]
