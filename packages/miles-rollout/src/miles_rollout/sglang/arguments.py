"""SGLang's arguments under SGLang's own names, checked before anything is started."""

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miles_core.errors import InputError
from miles_rollout.sglang import cpu

# What Miles itself decides: key -> where a user decides it instead.
_OWNED = {
    "model_path": "set model.path",
    "api_key": "Miles makes a new key for every engine",
    "admin_api_key": "Miles makes a new key for every engine",
    "weight_version": "Miles counts versions: 0 is the initial checkpoint",
    "skip_tokenizer_init": "engines get and give token ids: the worker owns the tokenizer",
    "enable_deterministic_inference": "set deterministic",
}


@functools.cache
def known_arguments() -> frozenset[str]:
    """The fields of the installed SGLang's ServerArgs, read from its source: importing it takes ten seconds."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations  # the package's __init__ saw to it
    source = Path(spec.submodule_search_locations[0], "srt", "server_args.py").read_text()
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    server_args = next(node for node in classes if node.name == "ServerArgs")
    fields = (node.target for node in server_args.body if isinstance(node, ast.AnnAssign))
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))


def check_arguments(arguments: Mapping[str, Any], setting: str = "rollout.sglang") -> None:
    """Refuse names that SGLang does not have, or that Miles decides.

    Args:
        arguments: SGLang's names and the values wanted.
        setting: where they were written, for the error.

    Raises:
        InputError: with the nearest known name.
    """
    for name, value in arguments.items():
        if name in _OWNED:
            raise InputError(f"{setting}.{name}", value, "not a setting of a recipe", f"{_OWNED[name]}.".capitalize())
        if name not in known_arguments():
            near = difflib.get_close_matches(name, known_arguments(), n=1, cutoff=0.5)
            way_out = f"Did you mean {near[0]!r}?" if near else "See `python -m sglang.launch_server --help`."
            raise InputError(f"{setting}.{name}", value, f"SGLang {cpu.TESTED_VERSION} has no such argument", way_out)


def complete_arguments(arguments: Mapping[str, Any], deterministic: bool) -> dict[str, Any]:
    """Add what the chosen device needs to the user's arguments; the user's win.

    Args:
        arguments: checked; `device` says where to run ("cpu", "cuda"; SGLang looks for itself if absent).
        deterministic: make seeds count.
    """
    ours: dict[str, Any] = {
        "host": "127.0.0.1",
        "weight_version": "0",
        "skip_tokenizer_init": True,
        # One line for every HTTP request otherwise.
        "log_level_http": "warning",
    }
    if arguments.get("device") == "cpu":
        # The warm-up sleeps for a second and compiles nothing on a CPU.
        ours |= {**cpu.ARGUMENTS, "skip_server_warmup": True}
        if deterministic:
            ours |= cpu.DETERMINISTIC_ARGUMENTS
    elif deterministic:
        ours["enable_deterministic_inference"] = True
    return {**ours, **arguments}
