"""Metrics to TensorBoard and Weights & Biases. Both libraries are extras, imported when a sink is made."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from miles_core.config import ObserveSection
from miles_core.observe._extras import require
from miles_core.observe.metrics import Sink

_SECRET = re.compile(r"(^|[_.-])(key|keys|token|secret|secrets|password|passwd|credentials?)$", re.IGNORECASE)


class TensorBoardSink:
    """Writes scalars as TensorBoard events; needs `miles-core[tensorboard]`."""

    def __init__(self, folder: Path):
        """Write to `folder`; made if missing.

        Raises:
            ImportError: the extra is not installed.
        """
        self._writer = require("tensorboard.summary", "tensorboard").Writer(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add each number under its name; flushed once a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """Logs to a W&B project; needs `miles-core[wandb]` and, for the account, what `wandb login` left or WANDB_API_KEY.

    What could hold a secret stays here: the terminal's output, the command line, the code and the git state are not
    uploaded, and of the configuration the values of keys that are named like secrets are left out.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]):
        """Start or continue the run `name`.

        Args:
            project: W&B's project.
            name: of the run, and its id there, so that a resumed run continues the old curves.
            folder: where wandb keeps its files; must be there.
            config: shown beside the curves.

        Raises:
            ImportError: the extra is not installed.
        """
        wandb = require("wandb", "wandb")
        settings = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True)
        self._run = wandb.init(
            project=project,
            name=name,
            id=name,
            dir=str(folder),
            resume="allow",
            settings=settings,
            config=redact(config),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the numbers of one step."""
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


def open_sinks(observe: ObserveSection, folder: Path, name: str, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks that `[observe]` asks for.

    Args:
        observe: the recipe's section.
        folder: of the run; events go to `tensorboard/` and `wandb/` in it.
        name: of the run.
        config: the resolved recipe, for W&B.

    Raises:
        ImportError: an extra is not installed; names it.
    """
    sinks: list[Sink] = []
    if observe.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if observe.wandb:
        sinks.append(WandbSink(observe.wandb, name, folder, config))
    return sinks


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables in which the values of keys named like secrets (`api_key`, `hf_token`) are "***"."""
    return {key: "***" if _SECRET.search(key) else _redact_inside(value) for key, value in config.items()}


def _redact_inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(cast(Mapping[str, Any], value))
    if isinstance(value, list | tuple):
        return [_redact_inside(item) for item in cast(Sequence[Any], value)]
    return value
