"""The folder of a run, and what is read back from it to resume.

runs/<name>/  recipe.toml  versions.json  metrics.jsonl  samples/  trace/  logs/  checkpoints/  hf/  reward.png
"""

import importlib.metadata
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from miles_core import InputError, Recipe, load_recipe

REPORTED_PACKAGES = (
    "miles-core", "miles-rollout", "miles-train", "miles-sync", "miles-precision", "miles-lora", "miles-launch",
    "sglang", "megatron-core", "ray", "torch", "transformers",
)  # fmt: skip
# Keys that may change when a run goes on: they decide how long, how often and where, not what is computed.
FREE_ON_RESUME = (
    "name", "train.steps", "train.save_every", "train.keep_checkpoints", "train.deadline_s", "rollout.deadline_s",
    "rollout.request_deadline_s", "rollout.max_retries", "sync.deadline_s", "contracts", "observe", "cluster",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Parquet, a folder a step."""
        return self.path / "samples"

    @property
    def trace(self) -> Path:
        """Chrome traces."""
        return self.path / "trace"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """What a run resumes from."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model as a Hugging Face directory."""
        return self.path / "hf"

    @property
    def plot(self) -> Path:
        """The reward curve."""
        return self.path / "reward.png"


def new_run(runs: Path, recipe: Recipe) -> RunDir:
    """Make `runs/<name>`, or `runs/<name>-2` and so on when there is one already: a run never overwrites another.

    Raises:
        InputError: the folder cannot be made.
    """
    number = 1 + max((number for number, _ in _existing(runs, recipe.name)), default=0)
    run = RunDir(runs / (recipe.name if number == 1 else f"{recipe.name}-{number}"))
    try:
        for folder in (run.path, run.samples, run.trace, run.logs, run.checkpoints):
            folder.mkdir(parents=True)
        run.recipe.write_text(tomli_w.dumps(_table(recipe)))
        run.path.joinpath("versions.json").write_text(json.dumps(versions(), indent=2))
    except OSError as error:
        raise InputError(
            "runs", str(run.path), f"cannot be written ({error.strerror})", "Use --runs FOLDER, or free the disk."
        ) from None
    return run


def find_run(runs: Path, recipe: Recipe) -> RunDir:
    """The newest run of this name, checked to be one of this recipe.

    Raises:
        InputError: there is none, or its recipe differs in something that decides what is computed.
    """
    existing = sorted(_existing(runs, recipe.name))
    if not existing:
        raise InputError("--resume", str(runs / recipe.name), "there is no such run", "Start it without --resume.")
    run = RunDir(existing[-1][1])
    old, new = _flat(_table(load_recipe(run.recipe))), _flat(_table(recipe))
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE_ON_RESUME)
        if not free and old.get(key) != new.get(key):
            raise InputError(
                key, new.get(key), f"the run in {run.path} has {old.get(key)!r}", "Start a new run to change it."
            )
    return run


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes, and the time."""
    found = {name: _version(name) for name in REPORTED_PACKAGES}
    return {**found, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _existing(runs: Path, name: str) -> Iterator[tuple[int, Path]]:
    for path in runs.glob(f"{name}*"):
        match = re.fullmatch(r"(?:-(\d+))?", path.name.removeprefix(name))
        if match and (path / "recipe.toml").is_file():
            yield int(match[1] or 1), path


def _table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as TOML takes it: nothing that is None."""
    return _without_none(recipe.model_dump(mode="json"))


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
