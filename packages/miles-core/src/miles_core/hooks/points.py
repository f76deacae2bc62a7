"""Every place where user code attaches: where a recipe names it, what it must look like, what comes with Miles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miles_core.config import HookSpec
from miles_core.errors import InputError
from miles_core.hooks.load import load_hook, load_object

_ADVANTAGES = "miles_core.algorithms.advantages"
_LOSSES = "miles_core.algorithms.losses"
_KL = "miles_core.algorithms.kl"
_PROTOCOLS = "miles_core.hooks.protocols"


@dataclass(frozen=True, slots=True)
class Point:
    """An extension point.

    Attributes:
        kind: its name for `miles hooks --new`.
        setting: the recipe's key.
        protocol_name: full name of its protocol; a name, because some speak torch.
        runs_in: the process that calls it.
        built_in: short names of what comes with Miles, and what they stand for.
    """

    kind: str
    setting: str
    protocol_name: str
    runs_in: str
    built_in: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def protocol(self) -> type:
        """The protocol, imported; that of a loss takes torch."""
        return load_object(self.protocol_name, self.kind)

    def load(self, spec: HookSpec, setting: str = "") -> Callable[..., Any]:
        """Load what a recipe names here, checked.

        Args:
            spec: name and parameters.
            setting: the recipe's key where it is another than the point's, for errors.

        Raises:
            InputError: it cannot be imported, or cannot be called as it will be.
        """
        return load_hook(spec, setting or self.setting, self.protocol, self.built_in)


def _in(module: str, **names: str) -> Mapping[str, str]:
    return {short: f"{module}:{name}" for short, name in names.items()}


def _called_in(process: str, *kinds: str) -> list[Point]:
    """Hooks whose protocol is called after them."""
    named = {kind: "".join(word.capitalize() for word in kind.split("_")) for kind in kinds}
    return [Point(kind, f"hooks.{kind}", f"{_PROTOCOLS}:{name}", process) for kind, name in named.items()]


_ESTIMATORS = _in(
    _ADVANTAGES,
    grpo="grpo",
    dr_grpo="dr_grpo",
    rloo="rloo",
    reinforce="reinforce",
    reinforce_plus_plus="reinforce_plus_plus",
    reinforce_plus_plus_baseline="reinforce_plus_plus_baseline",
    gae="gae",
    gdpo="gdpo",
    preference="preference",
)
_REDUCTIONS = _in(
    "miles_core.algorithms.reductions",
    token_mean="token_mean",
    sample_mean="sample_mean",
    sample_sum="sample_sum",
    group_mean="group_mean",
    constant_length="constant_length",
)
_LOSS_NAMES = _in(
    _LOSSES,
    ppo_clip="PPOClip",
    gspo="GSPO",
    cispo="CISPO",
    sapo="SAPO",
    policy_gradient="policy_gradient",
    sft="sft",
    dpo="DPO",
    distillation="Distillation",
    value_clip="ValueClip",
)
_CORRECTIONS = _in("miles_core.algorithms.corrections", tis="TIS", mis="MIS", icepop="IcePop")
_FILTERS = _in("miles_core.filters", zero_variance="zero_variance")
_SOURCES = _in("miles_core.tasks", copy_digits="copy_digits", largest_number="largest_number")

_ALL = (
    *_called_in("worker", "rollout", "generate", "group_reward"),
    *_called_in("reward process", "reward"),
    Point("filter_before_reward", "hooks.filter_before_reward", f"{_PROTOCOLS}:SampleFilter", "worker"),
    Point("sample_filter", "hooks.sample_filter", f"{_PROTOCOLS}:SampleFilter", "worker", _FILTERS),
    Point("advantage", "algorithm.advantage", f"{_ADVANTAGES}:Advantage", "driver", _ESTIMATORS),
    Point("reduction", "algorithm.reduction", f"{_PROTOCOLS}:Reduction", "driver", _REDUCTIONS),
    Point("loss", "algorithm.loss", f"{_LOSSES}:Loss", "trainer", _LOSS_NAMES),
    Point("correction", "algorithm.corrections", f"{_LOSSES}:Correction", "trainer", _CORRECTIONS),
    Point("kl", "algorithm.kl.estimator", f"{_KL}:KLEstimator", "trainer", _in(_KL, k1="k1", k2="k2", k3="k3")),
    Point("data_source", "data.source", f"{_PROTOCOLS}:MakesDataSource", "driver", _SOURCES),
    Point("model_source", "model.source", f"{_PROTOCOLS}:MakesModel", "driver"),
    *_called_in("trainer", "after_model_init", "before_logprobs", "before_train_step", "after_train_step"),
    *_called_in("driver", "metrics", "after_step", "on_checkpoint"),
)
POINTS: Mapping[str, Point] = {point.kind: point for point in _ALL}


def point_of(kind: str) -> Point:
    """The extension point of this kind.

    Raises:
        InputError: there is none.
    """
    if kind not in POINTS:
        raise InputError("hooks", kind, "there is no such extension point", f"There are: {', '.join(POINTS)}.")
    return POINTS[kind]
