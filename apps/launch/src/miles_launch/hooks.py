"""Every place where user code attaches, with what the rooms bring for it; and how `miles hooks` shows them."""

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from importlib.resources import files

from miles_core import hooks
from miles_core.algorithms.advantages.inputs import Doubles
from miles_core.errors import InputError
from miles_core.hooks import Point, load_object
from miles_core.types import Bools, Floats, Ints
from miles_rollout.rewards.load import BUILT_IN as REWARDS

_GENERATE = {name: f"miles_rollout.generate:{name}" for name in ("single_turn", "multi_turn")}
_BROUGHT: Mapping[str, Mapping[str, str]] = {"reward": REWARDS, "generate": _GENERATE}
_FAMILY = Point("model_family", "model.family", "miles_train.megatron.families:Family", "trainer")
POINTS: Mapping[str, Point] = {
    kind: replace(point, built_in=_BROUGHT.get(kind, point.built_in)) for kind, point in hooks.POINTS.items()
}
"""The extension points of miles_core.hooks with the short names of what the other rooms bring."""
_SHOWN: Mapping[str, Point] = {**POINTS, _FAMILY.kind: _FAMILY}

_ALIASES = {str(alias): name for name, alias in (("Floats", Floats), ("Ints", Ints), ("Bools", Bools))}
_ALIASES |= {str(Doubles): "NDArray[float64]"}
_HEAD = """\
Where code of one's own attaches. In a recipe it is named "package.module:name", by a short name, or with parameters:

    [hooks]
    reward = { name = "my_reward:score", weight = 0.5 }

miles hooks KIND tells more about one of them; miles hooks --new KIND prints a file to start from.
"""


def overview() -> str:
    """All extension points: key, signature, and the names of what comes with Miles."""
    return "\n".join([_HEAD, *map(_entry, _SHOWN.values())])


def describe(kind: str) -> str:
    """One extension point with its documentation, that of its arguments, and the signatures of what comes with Miles.

    Raises:
        InputError: there is no such extension point.
    """
    point = _point(kind)
    protocol = point.protocol
    call = vars(protocol).get("__call__")
    parts = [_entry(point), inspect.getdoc(protocol) or ""]
    if call is not None:
        parts += [inspect.getdoc(call) or "", *_arguments(call)]
    parts += [f"{short}\n    {signature_of(load_object(name, kind))}" for short, name in point.built_in.items()]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def template(kind: str) -> str:
    """The text of a module that attaches to an extension point and works as it is.

    Raises:
        InputError: there is no such extension point.
    """
    return (files("miles_launch.hook_templates") / f"my_{_point(kind).kind}.py").read_text(encoding="utf-8")


def signature_of(code: typing.Any) -> str:
    """How a function, or a class that makes one, is called; types without the modules that they are from."""
    signature = inspect.signature(code)
    if inspect.isclass(code):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    text = f"{code.__module__}:{code.__qualname__}{signature}"
    name, bracket, rest = text.partition("(")
    return f"{name}{bracket}{_readable(rest)}"


def _point(kind: str) -> Point:
    if kind not in _SHOWN:
        raise InputError("miles hooks", kind, "there is no such extension point", f"There are: {', '.join(_SHOWN)}.")
    return _SHOWN[kind]


def _entry(point: Point) -> str:
    protocol = point.protocol
    call = vars(protocol).get("__call__")
    signature = inspect.signature(protocol if call is None else call)
    without_self = signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "self"])
    prefix = "async " if inspect.iscoroutinefunction(call) else ""
    lines = [
        f"{point.kind}",
        f"    recipe key  {point.setting}",
        f"    called in   {point.runs_in}",
        f"    signature   {prefix}{protocol.__name__}{_readable(str(without_self))}",
    ]
    if point.built_in:
        lines.append(f"    built in    {', '.join(point.built_in)}")
    return "\n".join(lines) + "\n"


def _readable(text: str) -> str:
    for alias, name in _ALIASES.items():
        text = text.replace(alias, name)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text).replace("'", "")


def _arguments(call: typing.Any) -> Iterator[str]:
    """The documentation of arguments that are data of ours."""
    for name, kind in typing.get_type_hints(call).items():
        if name != "return" and isinstance(kind, type) and is_dataclass(kind):
            yield f"{name}: {kind.__name__}\n\n{inspect.getdoc(kind)}"
