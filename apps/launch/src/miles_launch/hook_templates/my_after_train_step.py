"""Called in each trainer process after the last update of a step.

Save as my_after_train_step.py, and say in the recipe

    [hooks]
    after_train_step = { name = "my_after_train_step:stop_when_lost", most = 100.0 }
"""

from collections.abc import Mapping


def stop_when_lost(metrics: Mapping[str, float], *, most: float = 100.0) -> None:
    """End the run when the gradient's norm is above `most`. The metrics are equal on all ranks, so all of them stop."""
    if metrics["grad_norm"] > most:
        raise RuntimeError(f"grad_norm = {metrics['grad_norm']:g} is above {most:g}: see the samples of this step")
