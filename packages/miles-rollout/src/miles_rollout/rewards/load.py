"""From the recipe's words to a judge."""

from typing import cast

from miles_core import hooks
from miles_core.config import HookSpec, RewardSection
from miles_core.hooks import GroupReward, Reward, load_hook
from miles_rollout.rewards.group import GroupJudge
from miles_rollout.rewards.judge import InProcessJudge, Judge
from miles_rollout.rewards.pool import PoolSettings, RewardPool

_REWARDS = "miles_rollout.rewards"
BUILT_IN = {
    "code_tests": f"{_REWARDS}.code:code_tests",
    "exact_match": f"{_REWARDS}.builtin:exact_match",
    "http_server": f"{_REWARDS}.remote:HttpServer",
    "json_schema": f"{_REWARDS}.schema:json_schema",
    "last_integer": f"{_REWARDS}.builtin:last_integer",
    "math_equal": f"{_REWARDS}.mathematics:math_equal",
    "position_match": f"{_REWARDS}.builtin:position_match",
    "reasoning_gym": f"{_REWARDS}.gym:reasoning_gym",
    "regex_match": f"{_REWARDS}.builtin:regex_match",
    "sglang_model": f"{_REWARDS}.remote:SGLangModel",
    "tool_calls": f"{_REWARDS}.tools:tool_calls",
    "verifiers": f"{_REWARDS}.environment:verifiers",
}
"""Short names of the rewards that come with Miles."""
# They run no code but ours and wait for a server: one process asks for all groups at once.
_REMOTE = frozenset({BUILT_IN["http_server"], BUILT_IN["sglang_model"]})


def full_name(spec: HookSpec, setting: str = "hooks.reward") -> HookSpec:
    """The same reward as "package.module:name": built-ins and entry points may go by their bare names.

    Raises:
        InputError: a bare name that nothing has.
    """
    return HookSpec(name=hooks.full_name(spec.name, setting, BUILT_IN), params=spec.params)


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
    if full.name in _REMOTE:
        return cast("Judge", load_hook(full, setting, Reward))  # which these classes are besides
    if not section.isolate:
        return InProcessJudge(load_hook(full, setting, Reward), spec.name)
    return RewardPool(full.name, full.params, _limits(section))


def make_group_judge(spec: HookSpec, section: RewardSection, setting: str = "hooks.group_reward") -> Judge:
    """The judge that `[hooks] group_reward` and `[reward]` ask for; `timeout_s` is that of a group.

    Args:
        spec: "package.module:name" or an entry point; with parameters.
        section: whether the reward runs isolated, and its limits.
        setting: the recipe key, for errors.

    Raises:
        InputError: without isolation, a reward that cannot be loaded. Isolated ones say so at RewardPool.start.
    """
    full = HookSpec(name=hooks.full_name(spec.name, setting, {}), params=spec.params)
    if not section.isolate:
        return GroupJudge(load_hook(full, setting, GroupReward), spec.name, section.timeout_s)
    return RewardPool(full.name, full.params, _limits(section), group=True)


def _limits(section: RewardSection) -> PoolSettings:
    return PoolSettings(section.processes, section.timeout_s, section.memory_bytes)
