"""From the recipe's words to a judge."""

from miles_core.config import HookSpec, RewardSection
from miles_core.hooks import Reward, load_hook
from miles_rollout.rewards.judge import InProcessJudge, Judge
from miles_rollout.rewards.pool import PoolSettings, RewardPool

_BUILT_IN = frozenset({"exact_match", "last_integer", "position_match"})


def full_name(spec: HookSpec) -> HookSpec:
    """The same reward as "package.module:name": built-ins may go by their bare names."""
    name = f"miles_rollout.rewards:{spec.name}" if spec.name in _BUILT_IN else spec.name
    return HookSpec(name=name, params=spec.params)


def make_judge(spec: HookSpec, section: RewardSection, setting: str = "hooks.reward") -> Judge:
    """The judge that `[hooks] reward` and `[reward]` ask for.

    Args:
        spec: a built-in's bare name, or "package.module:name"; with parameters.
        section: whether the reward runs isolated, and its limits.
        setting: the recipe key, for errors.

    Raises:
        InputError: without isolation, a reward that cannot be loaded. Isolated ones say so at RewardPool.start.
    """
    full = full_name(spec)
    if not section.isolate:
        return InProcessJudge(load_hook(full, setting, Reward), spec.name)
    limits = PoolSettings(section.processes, section.timeout_s, section.memory_bytes)
    return RewardPool(full.name, full.params, limits)
