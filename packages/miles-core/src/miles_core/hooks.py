"""User code: the protocol of every extension point, and how a name in a recipe becomes a checked callable.

Code is named `"package.module:name"`, with parameters beside it in the recipe, or passed as an object in Python. At
load time the signature is compared with the protocol's, so that a wrong hook is an error before any process starts.
"""

import functools
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from miles_core.config import HookSpec
from miles_core.errors import InputError
from miles_core.types import Batch, Group, Prompt, Sample, StepReport


class Reward(Protocol):
    """Judge one sample. May be `async def`. Returns a number, or named parts with the total under "reward"."""

    def __call__(
        self, prompt: Prompt, sample: Sample
    ) -> float | Mapping[str, float] | Awaitable[float | Mapping[str, float]]:
        """Return the reward of `sample`; a raise or a non-finite number drops the group with that reason."""
        ...


class SampleFilter(Protocol):
    """Keep a judged group, or drop it with a reason."""

    def __call__(self, group: Group) -> str | None:
        """Return None to keep the group, or the reason why it is dropped."""
        ...


class DataSource(Protocol):
    """Prompts by position: the same position gives the same prompt, so a cursor is one number."""

    def __call__(self, start: int, count: int) -> Sequence[Prompt]:
        """Return prompts `start` to `start + count` of an endless sequence."""
        ...


class Metrics(Protocol):
    """Numbers of one's own for each step, from the groups that were trained on."""

    def __call__(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """Return slash names and numbers."""
        ...


class AfterModelInit(Protocol):
    """Called in each trainer process once its model has its weights."""

    def __call__(self, model: Any) -> None:
        """Take the list of model chunks; may change them in place."""
        ...


class BeforeLogprobs(Protocol):
    """Called in each trainer process before old logprobs are computed."""

    def __call__(self, batch: Batch) -> None:
        """Take the rank's shard of the step."""
        ...


class BeforeTrainStep(Protocol):
    """Called in each trainer process before the first update of a step."""

    def __call__(self, batch: Batch) -> None:
        """Take the rank's shard of the step."""
        ...


class AfterTrainStep(Protocol):
    """Called in each trainer process after the last update of a step."""

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Take the metrics of the step, equal on all ranks."""
        ...


class AfterStep(Protocol):
    """Called in the driver when a step is over: evaluate, log, stop."""

    def __call__(self, report: StepReport, groups: Sequence[Group]) -> None:
        """Take the step's report and the groups that were trained on."""
        ...


class OnCheckpoint(Protocol):
    """Called in the driver once a checkpoint is complete on disk."""

    def __call__(self, step: int, path: Path) -> None:
        """Take the step it was written after, and its folder."""
        ...


def load_object(name: str, setting: str) -> Any:
    """Import `"package.module:name"`.

    Args:
        name: dotted module, colon, attribute.
        setting: the recipe key that named it, for the error.

    Raises:
        InputError: the module cannot be imported or has no such attribute.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise InputError(setting, name, 'code is named "package.module:name"', "Add the module or the attribute.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        rule = f"the module cannot be imported ({type(error).__name__}: {error})"
        raise InputError(setting, name, rule, "Install it, set PYTHONPATH, or mend it.") from error
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        known = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))) or "nothing public"
        raise InputError(setting, name, f"{module_name} has no {attribute!r}", f"It has: {known}.") from None


def load_hook(spec: HookSpec, setting: str, protocol: type) -> Callable[..., Any]:
    """Load the code that `spec` names, bind its parameters, and check that it can be called as `protocol` says.

    Args:
        spec: name and parameters from the recipe.
        setting: the recipe key, for errors.
        protocol: one of the protocols of this module, whose `__call__` gives the positional arguments.

    Returns:
        The callable with the recipe's parameters bound.

    Raises:
        InputError: it cannot be imported, is not callable, or does not take these arguments.
    """
    code = load_object(spec.name, setting)
    return bind(code, spec.params, f"{setting} ({spec.name})", protocol)


def bind(code: Any, params: Mapping[str, Any], setting: str, protocol: type) -> Callable[..., Any]:
    """Bind `params` to `code` and check its signature against `protocol`'s `__call__`."""
    call = inspect.signature(protocol.__call__)
    positional = [name for name in call.parameters if name != "self"]
    expected = f"{protocol.__name__}({', '.join([*positional, *params])})"
    if not callable(code):
        raise InputError(setting, type(code).__name__, f"must be callable as {expected}", "Name a function.")
    try:
        signature = inspect.signature(code)
    except (TypeError, ValueError):  # some builtins have none; the first call will tell
        return functools.partial(code, **params)
    try:
        signature.bind(*positional, **params)
    except TypeError as error:
        raise InputError(
            setting, f"{signature}", f"must be callable as {expected}: {error}", "Change its arguments."
        ) from None
    return functools.partial(code, **params) if params else code
