"""Training with stock Megatron-Core, on many GPUs, one, or none.

The door is lazy: `MegatronTrainer` imports Megatron (seconds) when it is asked for, in the trainer's process. A driver
that only checks a recipe imports `miles_train.megatron.settings` and `miles_train.megatron.weights`, which do not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_train.megatron.trainer import MegatronTrainer

__all__ = ["MegatronTrainer"]


def __getattr__(name: str) -> Any:
    if name == "MegatronTrainer":
        from miles_train.megatron.trainer import MegatronTrainer  # noqa: PLC0415  # seconds of Megatron

        return MegatronTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
