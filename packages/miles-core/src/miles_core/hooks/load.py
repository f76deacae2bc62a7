"""How a name in a recipe becomes a checked callable.

    "package.module:name"    imported
    "name"                   built in, or an entry point of the group `miles.hooks`

At load time the signature is compared with the protocol's, so that a wrong hook is an error before any process starts.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from miles_core.config import HookSpec
from miles_core.errors import InputError

ENTRY_POINTS = "miles.hooks"


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


def full_name(name: str, setting: str, built_in: Mapping[str, str]) -> str:
    """The `"package.module:name"` of a name in a recipe.

    Args:
        name: that already, the key of a built-in, or the name of an entry point.
        setting: the recipe key, for errors.
        built_in: full names of what comes with Miles.

    Raises:
        InputError: nothing, or several installed packages, have that name.
    """
    if ":" in name:
        return name
    if name in built_in:
        return built_in[name]
    found = {point.value for point in entry_points(group=ENTRY_POINTS, name=name)}
    if len(found) == 1:
        return found.pop()
    if found:
        rule = f"several installed packages have it: {', '.join(sorted(found))}"
        raise InputError(setting, name, rule, "Write the full name.")
    known = [*built_in, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)})]
    near = difflib.get_close_matches(name, known, n=1)
    rule = 'code is named "package.module:name", or by a name that is built in or an entry point of "miles.hooks"'
    way_out = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known) or 'no short names'}."
    raise InputError(setting, name, rule, way_out)


def load_hook(
    spec: HookSpec, setting: str, protocol: type, built_in: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """Load the code that `spec` names, bind its parameters, and check that it can be called as `protocol` says.

    Args:
        spec: name and parameters from the recipe.
        setting: the recipe key, for errors.
        protocol: whose `__call__` gives the positional arguments.
        built_in: short names and what they stand for.

    Returns:
        The callable with the recipe's parameters bound; of a class an object made with them.

    Raises:
        InputError: it cannot be imported, is not callable, or does not take these arguments.
    """
    code = load_object(full_name(spec.name, setting, built_in or {}), setting)
    return bind(code, spec.params, f"{setting} ({spec.name})", protocol)


def bind(code: Any, params: Mapping[str, Any], setting: str, protocol: type) -> Callable[..., Any]:
    """Bind `params` to `code` and check its signature against `protocol`'s `__call__`.

    Parameters of a class go to its constructor, and the object is what will be called; unless the protocol asks for
    something that makes objects.

    Raises:
        InputError: what was found cannot be called as expected.
    """
    if inspect.isclass(code) and not getattr(protocol, "is_factory", False):
        code, params = _made(code, params, setting), {}
    call = inspect.signature(protocol.__call__)
    positional = [name for name in call.parameters if name != "self"]
    expected = f"{protocol.__name__}({', '.join([*positional, *params])})"
    if not callable(code):
        raise InputError(setting, type(code).__name__, f"must be callable as {expected}", "Name a function.")
    _check_async(code, setting, protocol, call)
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
    if not params:
        return code
    bound = functools.partial(code, **params)
    bound.needs = getattr(code, "needs", frozenset[str]())  # pyright: ignore[reportAttributeAccessIssue]
    return bound


def _made(code: type, params: Mapping[str, Any], setting: str) -> Any:
    try:
        return code(**params)
    except InputError:
        raise
    except (TypeError, ValueError) as error:  # wrong names, wrong values
        rule = f"{code.__name__}{inspect.signature(code)} cannot be made of these parameters: {error}"
        raise InputError(setting, dict(params), rule, "Change its parameters.") from error


def _check_async(code: Any, setting: str, protocol: type, call: inspect.Signature) -> None:
    is_async = inspect.iscoroutinefunction(code) or inspect.iscoroutinefunction(type(code).__call__)
    must_be = inspect.iscoroutinefunction(protocol.__call__)
    if must_be and not is_async:
        rule = f"{protocol.__name__} must be `async def`: it is awaited"
        raise InputError(setting, "def", rule, "Write `async def`.")
    if is_async and not must_be and "Awaitable" not in str(call.return_annotation):
        rule = f"{protocol.__name__} must be a plain function: nobody would await it"
        raise InputError(setting, "async def", rule, "Write `def`.")
