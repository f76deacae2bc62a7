"""From a recipe to everything that can be known to be right before a process starts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from miles_core import HookSpec, InputError, Recipe
from miles_core.algorithms import Advantage, grpo
from miles_core.data import file_prompts
from miles_core.hooks import (
    AfterModelInit,
    AfterStep,
    AfterTrainStep,
    BeforeLogprobs,
    BeforeTrainStep,
    DataSource,
    Metrics,
    OnCheckpoint,
    Reward,
    SampleFilter,
    bind,
    load_hook,
    load_object,
)
from miles_launch.recorder import DriverHooks
from miles_rollout.rewards.load import full_name
from miles_rollout.sglang.arguments import check_arguments
from miles_train.megatron.layout import Layout, check_layout
from miles_train.megatron.settings import check_settings

# Where the trainer's and the engine's arithmetic differ by rounding alone; measured gaps are 10 to 100 times smaller.
DEFAULT_GAP = {"float32": 1e-3, "bfloat16": 0.03}
ADVANTAGES: Mapping[str, Callable[..., Any]] = {"grpo": grpo}
LOSSES = {"ppo_clip": "miles_core.algorithms.losses:PPOClip"}
TRAINER_HOOKS: Mapping[str, type] = {
    "after_model_init": AfterModelInit,
    "before_logprobs": BeforeLogprobs,
    "before_train_step": BeforeTrainStep,
    "after_train_step": AfterTrainStep,
}


class MakesModel(Protocol):
    """`model.source`: makes a Hugging Face directory at `path`."""

    def __call__(self, path: Path) -> object:
        """Write the directory; it is not there yet."""
        ...


class MakesDataSource(Protocol):
    """`data.source`: opens an endless sequence of prompts."""

    def __call__(self, seed: int) -> DataSource:
        """Return the source; `seed` is the run's."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the driver needs of a checked recipe."""

    recipe: Recipe
    model_path: Path
    layout: Layout
    source: DataSource
    advantage: Advantage
    hooks: DriverHooks
    loss: HookSpec
    dtype: str
    max_logprob_gap: float


def prepare(recipe: Recipe) -> Prepared:
    """Check all that the recipe names: engine arguments, code, model directory, prompts. Makes the model if asked to.

    Raises:
        InputError: for the first thing that is wrong.
    """
    check_settings(recipe.train.megatron)
    check_arguments(recipe.rollout.sglang)
    _check_actor_hooks(recipe)
    if recipe.model.family is not None:
        from miles_train.megatron.families import check_name  # noqa: PLC0415 (imports torch)

        check_name(recipe.model.family)
    hooks = recipe.hooks
    model_path = _model(recipe)
    dtype = "bfloat16" if recipe.train.megatron.get("bf16") else "float32"
    return Prepared(
        recipe=recipe,
        model_path=model_path,
        layout=check_layout(recipe.train.megatron, recipe.train.num_ranks, _config(model_path)),
        source=_source(recipe),
        advantage=_advantage(recipe.algorithm.advantage),
        hooks=DriverHooks(
            metrics=_optional(hooks.metrics, "hooks.metrics", Metrics),
            after_step=_optional(hooks.after_step, "hooks.after_step", AfterStep),
            on_checkpoint=_optional(hooks.on_checkpoint, "hooks.on_checkpoint", OnCheckpoint),
        ),
        loss=_loss(recipe.algorithm.loss),
        dtype=dtype,
        max_logprob_gap=recipe.contracts.max_logprob_gap or DEFAULT_GAP[dtype],
    )


def _check_actor_hooks(recipe: Recipe) -> None:
    """Code that actors will load is loaded here once, so that a mistake is found before they start."""
    load_hook(full_name(recipe.hooks.reward), "hooks.reward", Reward)
    _optional(recipe.hooks.sample_filter, "hooks.sample_filter", SampleFilter)
    for name, protocol in TRAINER_HOOKS.items():
        _optional(getattr(recipe.hooks, name), f"hooks.{name}", protocol)


def _optional(spec: HookSpec | None, setting: str, protocol: type) -> Callable[..., Any] | None:
    return None if spec is None else load_hook(spec, setting, protocol)


def _model(recipe: Recipe) -> Path:
    path = Path(recipe.model.path)
    if not path.exists() and recipe.model.source is not None:
        load_hook(recipe.model.source, "model.source", MakesModel)(path)
    if not (path / "config.json").is_file():
        raise InputError(
            "model.path",
            recipe.model.path,
            "must be a Hugging Face directory with a config.json",
            "Download the model there, or name code that makes it in model.source.",
        )
    return path


def _config(model_path: Path) -> Mapping[str, Any]:
    file = model_path / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(file), "...", f"must be JSON: {error}", "Download it again.") from None


def _source(recipe: Recipe) -> DataSource:
    data = recipe.data
    if data.prompts is not None:
        return file_prompts(data.prompts, data.prompt_field, data.shuffle, recipe.seed)
    assert data.source is not None  # one of the two, by the recipe's own rule
    source = load_hook(data.source, "data.source", MakesDataSource)(recipe.seed)
    return bind(source, {}, f"data.source ({data.source.name})", DataSource)


def _advantage(spec: HookSpec) -> Advantage:
    code = ADVANTAGES.get(spec.name) or load_object(spec.name, "algorithm.advantage")
    return bind(code, spec.params, f"algorithm.advantage ({spec.name})", Advantage)


def _loss(spec: HookSpec) -> HookSpec:
    """The loss by its full name; it is built in the trainer's process, where torch is."""
    return HookSpec(name=LOSSES.get(spec.name, spec.name), params=spec.params)
