"""A family: what it takes to train an architecture, its weight table and its spec; and families from elsewhere.

A module outside this package names one `FAMILY = Family(table=..., spec=...)`, and a recipe names that by
`[model] family = "my_pkg.my_family:FAMILY"`. `packages/miles-train/examples` holds a whole one.

Importing this module imports torch, not Megatron: a driver checks a name without it.
"""

import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from miles_core.errors import InputError
from miles_core.hooks import bind, load_object
from miles_train.megatron import weights
from miles_train.megatron.weights import WeightTable, table_for
from miles_train.model_dir import ModelDirectory

if TYPE_CHECKING:
    from miles_train.megatron.specs.build import Spec

SETTING = "model.family"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture in Megatron.

    Attributes:
        table: from config.json and the names of the stored tensors to the table (`miles_train.megatron.weights`).
        spec: the Megatron model (`miles_train.megatron.specs`).
        with_more: the same with trained layers for multi-token prediction, where there is such.
    """

    table: Callable[[Mapping[str, Any], Collection[str]], WeightTable]
    spec: "Spec"
    with_more: "Family | None" = None


class MakesTable(Protocol):
    """`Family.table`."""

    def __call__(self, config: Mapping[str, Any], stored: Collection[str]) -> WeightTable:
        """Return the rows for config.json, given which tensors are stored."""
        ...


class MakesArguments(Protocol):
    """`Spec.arguments`."""

    def __call__(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return Megatron's arguments for config.json."""
        ...


class MakesLayers(Protocol):
    """`Spec.layers`."""

    def __call__(self, config: Mapping[str, Any], transformer: Any, backend: Any) -> list[Any]:
        """Return a ModuleSpec for each decoder layer of the whole model."""
        ...


class Finishes(Protocol):
    """`Spec.finish`."""

    def __call__(self, model: Any, config: Mapping[str, Any]) -> None:
        """Change a built chunk in place."""
        ...


def check_name(plug_in: str) -> None:
    """Check that the module of a plug-in can be found, as a driver does: it is not imported, which takes Megatron.

    Raises:
        InputError: the name is not of the form "package.module:name", or there is no such module.
    """
    module, colon, attribute = plug_in.partition(":")
    if not (colon and module and attribute):
        rule = 'a family is named "package.module:name"'
        raise InputError(SETTING, plug_in, rule, 'Write for example "my_pkg.my_family:FAMILY".')
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # packages around the module are imported, and may raise anything
        rule = f"the package of {module} cannot be imported ({type(error).__name__}: {error})"
        raise InputError(SETTING, plug_in, rule, "Install it, set PYTHONPATH, or mend it.") from error
    if found is None:
        raise InputError(SETTING, plug_in, f"there is no module {module}", "Install it, or set PYTHONPATH.")


def load_family(plug_in: str) -> Family:
    """Import a plug-in and check that it is what a trainer can use.

    Args:
        plug_in: "package.module:name" of a `Family`.

    Raises:
        InputError: it cannot be imported, is no `Family`, or a function of it cannot be called as it will be.
    """
    from miles_train.megatron.specs.build import Spec  # noqa: PLC0415  # Megatron, seconds that a driver does not need

    check_name(plug_in)
    family = load_object(plug_in, SETTING)
    if not isinstance(family, Family):
        rule = "must be a miles_train.megatron.families.Family"
        raise InputError(f"{SETTING} ({plug_in})", type(family).__name__, rule, "Name Family(table=..., spec=...).")
    if not isinstance(family.spec, Spec):
        rule = "must be a miles_train.megatron.specs.Spec"
        raise InputError(f"{SETTING} ({plug_in}).spec", type(family.spec).__name__, rule, "Make one of it.")
    bind(family.table, {}, f"{SETTING} ({plug_in}).table", MakesTable)
    bind(family.spec.arguments, {}, f"{SETTING} ({plug_in}).spec.arguments", MakesArguments)
    for name, protocol in (("layers", MakesLayers), ("mtp", MakesLayers), ("finish", Finishes)):
        bind(getattr(family.spec, name), {}, f"{SETTING} ({plug_in}).spec.{name}", protocol)
    return family


def family_of(
    directory: ModelDirectory, plug_in: str | None = None, *, predicts_more: bool = False
) -> tuple[WeightTable, "Spec"]:
    """The checked weight table and the spec of a model directory.

    Args:
        directory: the model.
        plug_in: "package.module:name" of its family; None for those of this package, by the class in config.json.
        predicts_more: whether layers for multi-token prediction are trained; else they pass through export unchanged.

    Raises:
        InputError: there is no such family, it is none, config.json lacks a key, or the tensors are not those of the
            table; no weight was read.
    """
    if plug_in is None:
        from miles_train.megatron.specs import spec_for  # noqa: PLC0415  # Megatron

        table = table_for(directory, predicts_more=predicts_more)
        return table, spec_for(directory.architecture, predicts_more=predicts_more)
    family = load_family(plug_in)
    if predicts_more:
        if family.with_more is None:
            raise InputError(
                "train.megatron.mtp_loss_scaling_factor",
                "set",
                f"{plug_in} has no layers for multi-token prediction",
                "Remove the key, or give the family `with_more`.",
            )
        family = family.with_more
    return weights.checked_table(directory, family.table), family.spec
