"""The driver's side of the loop: batches, the shuffling control, and the account of groups."""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from miles_core import ContractViolation, Group, Prompt, Sample, VersionSpan
from miles_core.algorithms.advantages import gae, grpo, reinforce
from miles_core.algorithms.kl import k1
from miles_core.cluster.actors import Crew, Member
from miles_core.observe import PhaseClock
from miles_core.queue import Lease
from miles_launch.actors import Made
from miles_launch.roles import ActorRollout, GroupBatcher, Learning


def group(name: str, rewards: Sequence[float]) -> Group:
    mask = np.array([False, True])
    return Group(
        Prompt(name, ""),
        tuple(
            Sample(np.zeros(2, np.int32), mask, np.zeros(2, np.float32), (VersionSpan(1, 2, 0),), "stop", reward=reward)
            for reward in rewards
        ),
    )


GROUPS = [group(str(i), [float(i * 4 + j) for j in range(4)]) for i in range(6)]


def advantages_of(batcher: GroupBatcher, step: int) -> np.ndarray:
    (shards,) = batcher.build(step, GROUPS)
    order = np.argsort(np.concatenate([shard.group_index for shard in shards]), kind="stable")
    return np.concatenate([shard.advantages[shard.loss_mask] for shard in shards])[order]


def test_shuffling_keeps_the_rewards_of_the_step_and_breaks_their_tie_to_samples():
    learning = Learning(reinforce)
    plain = advantages_of(GroupBatcher(learning, 1, 1, PhaseClock()), step=3)
    control = GroupBatcher(learning, 1, 1, PhaseClock(), shuffle_seed=7)
    shuffled = advantages_of(control, step=3)
    assert np.array_equal(plain, np.arange(24, dtype=np.float32))
    assert not np.array_equal(shuffled, plain)
    assert np.array_equal(np.sort(shuffled), plain)
    assert np.array_equal(advantages_of(control, step=3), shuffled), "repeatable"
    assert not np.array_equal(advantages_of(control, step=4), shuffled), "new every step"


def test_every_rank_gets_a_shard_of_every_minibatch():
    minibatches = GroupBatcher(Learning(grpo), 3, 2, PhaseClock()).build(0, GROUPS)
    assert [len(shards) for shards in minibatches] == [2, 2, 2]
    for shards in minibatches:
        assert sum(float(shard.loss_weights.sum()) for shard in shards) == pytest.approx(1)
    assert sum(len(shard.lengths) for shards in minibatches for shard in shards) == 24


def test_columns_that_the_algorithm_reads_come_from_samples_or_are_made():
    columns = {name: np.array([0, 0.5], np.float32) for name in ("values", "ref_logprobs", "teacher_logprobs")}
    groups = [Group(g.prompt, tuple(s.replace(columns=columns) for s in g.samples)) for g in GROUPS[:1]]
    learning = Learning(
        functools.partial(gae, normalize=False),
        kl_penalty=(k1, 2.0),
        advantage_columns=frozenset({"values", "ref_logprobs"}),
        loss_columns=frozenset({"returns", "staleness", "teacher_logprobs", "entropy"}),
    )
    (((batch,),)) = GroupBatcher(learning, 1, 1, PhaseClock()).build(3, groups)
    trained = batch.loss_mask
    # Rewards 0 to 3, KL 0 - 0.5 at the one trained token, value 0.5.
    assert batch.advantages[trained].tolist() == [0.5, 1.5, 2.5, 3.5]
    assert batch.columns["returns"][trained].tolist() == [1, 2, 3, 4]
    assert batch.columns["teacher_logprobs"][trained].tolist() == [0.5] * 4
    assert batch.columns["staleness"][trained].tolist() == [3] * 4
    assert set(batch.columns) == {"returns", "staleness", "teacher_logprobs"}


class ScriptedCrew:
    """Answers as worker and queue would; what is tested is the account that the driver keeps."""

    def __init__(self, made: Made):
        self.made = made

    async def call(self, member: Member, method: str, *_: Any, deadline_s: float) -> Any:
        if method == "roll_out":
            return self.made
        return Lease(0, tuple(GROUPS[: self.made.num_groups])) if method == "take" else None


def account(made: Made) -> ActorRollout:
    crew = cast(Crew, ScriptedCrew(made))
    worker, queue = Member("worker", 0, None), Member("queue", 0, None)
    prompts = [Prompt(str(i), "") for i in range(6)]
    rollout = ActorRollout(crew, worker, queue, lambda start, count: prompts[:count], 6, 1.0, PhaseClock(), 0)

    async def step() -> None:
        await rollout.generate(0)
        await rollout.acknowledge()

    asyncio.run(step())
    return rollout


def test_dropped_groups_are_counted_by_reason():
    rollout = account(Made(4, {"reward raised": 2}, {}))
    assert rollout.metrics == {"rollout/dropped": 2, "rollout/dropped/reward raised": 2}
    assert rollout.cursor == 6


def test_a_group_that_is_neither_trained_nor_dropped_stops_the_run():
    with pytest.raises(ContractViolation, match=r"of 6 groups 4 were trained on and .*.*1 are unaccounted"):
        account(Made(4, {"reward raised": 1}, {}))
