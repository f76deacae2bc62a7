"""The loop of Miles and its words. Knows no engine; imports neither ray nor torch."""

from miles_core.config import HookSpec, Recipe, check_recipe, load_recipe
from miles_core.errors import (
    ClusterDied,
    ContractViolation,
    DeadlineExceeded,
    InputError,
    Interrupted,
    MilesError,
    RoleDied,
    RolloutError,
)
from miles_core.types import Batch, Group, Prompt, Sample, StepReport, VersionSpan

__all__ = [  # noqa: RUF022 (grouped by subject)
    # words
    "Batch",
    "Group",
    "Prompt",
    "Sample",
    "StepReport",
    "VersionSpan",
    # recipe
    "HookSpec",
    "Recipe",
    "check_recipe",
    "load_recipe",
    # errors
    "ClusterDied",
    "ContractViolation",
    "DeadlineExceeded",
    "InputError",
    "Interrupted",
    "MilesError",
    "RoleDied",
    "RolloutError",
]
