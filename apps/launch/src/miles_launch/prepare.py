"""From a recipe to everything that can be known to be right before a process starts."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles_core import HookSpec, InputError, Recipe
from miles_core.algorithms import AdvantageInputs, needs_of
from miles_core.config import HooksSection
from miles_core.data import file_prompts
from miles_core.hooks import DataSource, bind
from miles_launch.hooks import POINTS
from miles_launch.recorder import DriverHooks
from miles_launch.roles import Learning
from miles_rollout.sglang.arguments import check_arguments
from miles_train.megatron.layout import Layout, check_layout
from miles_train.megatron.settings import check_settings

# Where the trainer's and the engine's arithmetic differ by rounding alone; measured gaps are 10 to 100 times smaller.
DEFAULT_GAP = {"float32": 1e-3, "bfloat16": 0.03}
TRAINER_HOOKS = ("after_model_init", "before_logprobs", "before_train_step", "after_train_step")
WORKER_HOOKS = ("rollout", "generate", "filter_before_reward", "sample_filter")
# Columns that the run makes by itself; what else a loss or an estimator needs, rollout code puts into its samples.
MADE_HERE = frozenset({"entropy", "group_index", "staleness"})
OF_A_CRITIC = frozenset({"values", "old_values"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the driver needs of a checked recipe."""

    recipe: Recipe
    model_path: Path
    layout: Layout
    source: DataSource
    learning: Learning
    hooks: DriverHooks
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
    learning = _learning(recipe)
    model_path = _model(recipe)
    dtype = "bfloat16" if recipe.train.megatron.get("bf16") else "float32"
    return Prepared(
        recipe=recipe,
        model_path=model_path,
        layout=check_layout(recipe.train.megatron, recipe.train.num_ranks, _config(model_path)),
        source=_source(recipe),
        learning=learning,
        hooks=DriverHooks(
            metrics=optional_hook(recipe.hooks, "metrics"),
            after_step=optional_hook(recipe.hooks, "after_step"),
            on_checkpoint=optional_hook(recipe.hooks, "on_checkpoint"),
        ),
        dtype=dtype,
        max_logprob_gap=recipe.contracts.max_logprob_gap or DEFAULT_GAP[dtype],
    )


def optional_hook(hooks: HooksSection, kind: str) -> Callable[..., Any] | None:
    """The code that `[hooks]` names for an extension point, loaded and checked; None if it names none."""
    spec: HookSpec | None = getattr(hooks, kind)
    return None if spec is None else POINTS[kind].load(spec)


def _check_actor_hooks(recipe: Recipe) -> None:
    """Code that actors will load is loaded here once, so that a mistake is found before they start."""
    hooks = recipe.hooks
    for kind in ("reward", "group_reward", *WORKER_HOOKS, *TRAINER_HOOKS):
        optional_hook(hooks, kind)


def _learning(recipe: Recipe) -> Learning:
    """What `[algorithm]` says, each part loaded once here; the loss is built again in the trainers."""
    from miles_core.algorithms.losses.build import build_loss  # noqa: PLC0415 (imports torch: not for a recipe alone)

    algorithm, kl = recipe.algorithm, recipe.algorithm.kl
    advantage = POINTS["advantage"].load(algorithm.advantage)
    in_reward = kl if kl is not None and kl.place == "reward" else None
    learning = Learning(
        advantage,
        POINTS["reduction"].load(algorithm.reduction),
        kl_penalty=(POINTS["kl"].load(in_reward.estimator), in_reward.coef) if in_reward else None,
        advantage_columns=needs_of(advantage) | ({"ref_logprobs"} if in_reward else frozenset()),
        loss_columns=build_loss(algorithm).needs,
    )
    from_samples = learning.advantage_columns | (learning.loss_columns - MADE_HERE - {"returns"})
    fields = {field.name for field in dataclasses.fields(AdvantageInputs)}
    if unknown := sorted(learning.advantage_columns - fields):
        rule = f"needs {unknown}, and estimators can have {sorted(fields)}"
        raise InputError("algorithm.advantage", algorithm.advantage.name, rule, "Change its `needs`.")
    if critic := sorted(learning.loss_columns & OF_A_CRITIC):
        rule = f"reads {critic} of a critic: it is not a loss for a policy"
        raise InputError("algorithm.loss", algorithm.loss.name, rule, "Use it in a trainer of a critic.")
    if from_samples and recipe.hooks.generate is None and recipe.hooks.rollout is None:
        rule = f"the algorithm reads {sorted(from_samples)} of each token, which the built-in rollout does not make"
        way_out = "Name a generate function in hooks.generate that puts them into Sample.columns."
        raise InputError("algorithm", algorithm.model_dump(exclude_defaults=True), rule, way_out)
    return learning


def _model(recipe: Recipe) -> Path:
    path = Path(recipe.model.path)
    if not path.exists() and recipe.model.source is not None:
        POINTS["model_source"].load(recipe.model.source)(path)
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
    source = POINTS["data_source"].load(data.source)(recipe.seed)
    return bind(source, {}, f"data.source ({data.source.name})", DataSource)
