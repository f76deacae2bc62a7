"""`--set` of the commands that load a model without a recipe: the recipe's own keys, checked as there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_core import InputError, Recipe
from miles_core.config import override_recipe
from miles_train.megatron.layout import fewest_ranks
from miles_train.megatron.settings import check_settings

READ = ("train.megatron.", "train.num_ranks=", "train.micro_batch_tokens=", "model.family=")


def tool_recipe(
    path: Path, overrides: Sequence[str], megatron: Mapping[str, Any] | None = None, family: str | None = None
) -> Recipe:
    """A recipe of nothing but a model and how to divide it.

    Args:
        path: a Hugging Face directory.
        overrides: of `--set`.
        megatron: `[train.megatron]` before them.
        family: `model.family` before them.

    Returns:
        A recipe whose `model` and `train` are of use; `train.num_ranks` is the fewest unless it was set.

    Raises:
        InputError: a key that these commands do not read, or a wrong value.
    """
    for override in overrides:
        if not override.startswith(READ):
            keys = ", ".join(key.rstrip(".=") for key in READ)
            rule = f"this command reads only {keys}"
            raise InputError("--set", override, rule, "Leave it out.")
    table = {
        "name": "tool",
        "model": {"path": str(path), **({} if family is None else {"family": family})},
        "data": {"source": "nobody:reads"},
        "hooks": {"reward": "nobody:reads"},
        "train": {"megatron": {"lr": 1e-6, **(megatron or {})}},
    }
    recipe = override_recipe(table, overrides)
    check_settings(recipe.train.megatron)
    if any(override.startswith("train.num_ranks=") for override in overrides):
        return recipe
    return override_recipe(table, [*overrides, f"train.num_ranks={fewest_ranks(recipe.train.megatron)}"])
