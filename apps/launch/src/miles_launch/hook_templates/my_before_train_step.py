"""Called in each trainer process before the first update of a step.

Save as my_before_train_step.py, and say in the recipe

    [hooks]
    before_train_step = { name = "my_before_train_step:note", every = 10 }
"""

import logging

from miles_core import Batch

_steps = 0


def note(batch: Batch, *, every: int = 10) -> None:
    """Log how many tokens this rank is given, every few steps."""
    global _steps
    _steps += 1
    if _steps % every == 0:
        logging.getLogger(__name__).warning("%d samples, %d tokens", len(batch.lengths), len(batch.tokens))
