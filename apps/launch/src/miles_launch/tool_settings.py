"""`--set` of the commands that load a model without a recipe: the recipe's own keys, checked as there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_core import InputError, Recipe
from miles_core.config import override_recipe
from miles_train.megatron.layout import fewest_ranks
from miles_train.megatron.settings import check_settings

LONGEST = 64
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


def probe_of(path: Path) -> dict[str, int]:
    """`vocab_size` of a model directory, and `longest`, tokens of the longest probe.

    Some rotary embeddings hold up to a length only; the trainer refuses longer sequences.

    Raises:
        InputError: config.json cannot be read, or names no vocabulary.
    """
    from miles_train.model_dir import open_model_directory  # noqa: PLC0415 (torch)

    config = open_model_directory(path).config
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    limits = [LONGEST, text.get("max_position_embeddings", LONGEST)]
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        limits.append(original or LONGEST)
    vocab_size = text.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise InputError("vocab_size in config.json", vocab_size, "must be a positive number", "Save the config again.")
    return {"vocab_size": vocab_size, "longest": max(2, min(limits))}
