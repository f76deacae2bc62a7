"""Called in each trainer process once its model has its weights.

Save as my_after_model_init.py, and say in the recipe

    [hooks]
    after_model_init = { name = "my_after_model_init:freeze", word = "embedding" }
"""

from typing import Any


def freeze(model: Any, *, word: str = "embedding") -> None:
    """Weights whose name holds `word` keep their values. `model` is the list of this rank's chunks, torch modules."""
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            if word in name:
                parameter.register_hook(lambda gradient: gradient * 0)
