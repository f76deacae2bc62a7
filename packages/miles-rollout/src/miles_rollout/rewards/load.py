"""From the recipe's words to a judge."""

import difflib

from miles_core.config import HookSpec, RewardSection
from miles_core.errors import InputError
from miles_core.hooks import Reward, load_hook
from miles_rollout.rewards.judge import InProcessJudge, Judge
from miles_rollout.rewards.pool import PoolSettings, RewardPool

_BUILT_IN = {
    "code_tests": "miles_rollout.rewards.code",
    "exact_match": "miles_rollout.rewards.builtin",
    "json_schema": "miles_rollout.rewards.schema",
    "last_integer": "miles_rollout.rewards.builtin",
    "math_equal": "miles_rollout.rewards.mathematics",
    "position_match": "miles_rollout.rewards.builtin",
    "reasoning_gym": "miles_rollout.rewards.gym",
    "regex_match": "miles_rollout.rewards.builtin",
    "tool_calls": "miles_rollout.rewards.tools",
    "verifiers": "miles_rollout.rewards.environment",
}


def full_name(spec: HookSpec, setting: str = "hooks.reward") -> HookSpec:
    """The same reward as "package.module:name": built-ins may go by their bare names.

    Raises:
        InputError: a bare name that no built-in has.
    """
    if spec.name in _BUILT_IN:
        return HookSpec(name=f"{_BUILT_IN[spec.name]}:{spec.name}", params=spec.params)
    if ":" not in spec.name:
        known = ", ".join(sorted(_BUILT_IN))
        near = difflib.get_close_matches(spec.name, _BUILT_IN, 1)
        way_out = f"Did you mean {near[0]!r}?" if near else f"Built in are {known}."
        raise InputError(setting, spec.name, 'is neither a built-in reward nor "package.module:name"', way_out)
    return spec


def make_judge(spec: HookSpec, section: RewardSection, setting: str = "hooks.reward") -> Judge:
    """The judge that `[hooks] reward` and `[reward]` ask for.

    Args:
        spec: a built-in's bare name, or "package.module:name"; with parameters.
        section: whether the reward runs isolated, and its limits.
        setting: the recipe key, for errors.

    Raises:
        InputError: without isolation, a reward that cannot be loaded. Isolated ones say so at RewardPool.start.
    """
    full = full_name(spec, setting)
    if not section.isolate:
        return InProcessJudge(load_hook(full, setting, Reward), spec.name)
    limits = PoolSettings(section.processes, section.timeout_s, section.memory_bytes)
    return RewardPool(full.name, full.params, limits)
