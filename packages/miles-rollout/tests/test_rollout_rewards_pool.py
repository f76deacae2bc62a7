"""Whatever a reward does, its sample gets a reason, the next one is judged, and nothing stays behind."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from miles_core.config import HookSpec, RewardSection
from miles_core.errors import InputError
from miles_core.types import Prompt, Sample, VersionSpan
from miles_rollout._processes import descendants
from miles_rollout.rewards import PoolSettings, RewardPool, Verdict, make_group_judge, make_judge

LIMITS = PoolSettings(timeout_s=60.0, memory_bytes=1 << 28)
IMPATIENT = replace(LIMITS, timeout_s=2.0)
PROMPT = Prompt("p1", "2+2=", {"answer": "4"})


@pytest.fixture(autouse=True)
def user_code_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def sample(text: str) -> Sample:
    tokens = np.arange(3, 9, dtype=np.int32)
    logprobs = np.linspace(-1, -0.25, 6, dtype=np.float32)
    return Sample(tokens, tokens > 4, logprobs, (VersionSpan(2, 6, 0),), "stop", text, metadata={"turns": 1})


def with_pool(
    use: Callable[[RewardPool], Awaitable[Any]], reward: str, limits: PoolSettings = LIMITS, **params: Any
) -> Any:
    async def run() -> Any:
        pool = RewardPool(f"rollout_user_code:{reward}", params, limits)
        try:
            return await use(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def judged(reward: str, *texts: str, **params: Any) -> list[Verdict]:
    return with_pool(lambda pool: pool.judge(PROMPT, [sample(text) for text in texts]), reward, **params)


def test_gives_what_the_function_gives() -> None:
    assert judged("length", "x", "yy", scale=2.0) == [Verdict(12.0), Verdict(12.0)]
    assert judged("parts", "x") == [Verdict(0.5, {"first": 3.0, "last": -0.25})]


def test_secrets_are_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_SECRET"):
        monkeypatch.setenv(name, "x")
    assert judged("environment", "x") == [Verdict(0.0)]


def test_files_are_not_inherited(tmp_path: Path) -> None:
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        (verdict,) = judged("count_open_files", "x")
    assert verdict.reward <= 5  # the socket, its loop's three, and the listing itself


def test_async_rewards_keep_one_loop_so_that_they_may_keep_connections() -> None:
    assert judged("same_loop", "x", "y", "z", seen=[]) == [Verdict(1.0)] * 3


@pytest.mark.parametrize(
    ("how", "failure", "detail"),
    [
        ("raise_error", "reward raised", "KeyError: 'answer'"),
        ("exit_python", "reward raised", "SystemExit: 3"),
        ("give_nan", "reward not finite", "returned nan"),
        ("give_text", "reward malformed", "'good'"),
        ("give_no_total", "reward malformed", 'no part "reward"'),
    ],
)
def test_a_bad_answer_has_a_reason_and_the_rest_is_judged(how: str, failure: str, detail: str) -> None:
    good, bad, rest = judged("misbehave", "good", "BAD", "good", how=how)
    assert good == rest == Verdict(1.0)
    assert bad.failure == failure and detail in bad.detail and np.isnan(bad.reward)


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("hang", "reward timeout"),
        ("hang_deaf", "reward timeout"),
        ("hide_a_process", "reward timeout"),
        ("allocate", "reward out of memory"),
        ("allocate_in_children", "reward out of memory"),
        ("daemonise_and_die", "reward process died"),
        ("print_much", "reward output"),
        ("exit_process", "reward process died"),
        ("fork_without_end", "reward processes"),
    ],
)
def test_what_must_be_killed_is_and_the_pool_goes_on(how: str, failure: str) -> None:
    async def use(pool: RewardPool) -> None:
        before = set(descendants(os.getpid()))
        good, bad, rest = await pool.judge(PROMPT, [sample("good"), sample("BAD"), sample("good")])
        assert good == rest == Verdict(1.0)
        assert bad.failure == failure and f"rollout_user_code:misbehave: {bad.detail.partition(': ')[2]}" == bad.detail
        assert await pool.judge(PROMPT, [sample("good")]) == [Verdict(1.0)]
        new = set(descendants(os.getpid())) - before
        assert len(new) == 1, f"beside the new process there are {[psutil.Process(pid).cmdline() for pid in new]}"

    before = set(psutil.pids())
    with_pool(use, "misbehave", IMPATIENT if failure == "reward timeout" else LIMITS, how=how)
    assert not [pid for pid in psutil.pids() if pid not in before and is_a_stray(pid)]
    left = [process for process in psutil.process_iter() if process.pid not in before and is_ours(process)]
    assert not psutil.wait_procs(left, timeout=2)[1]


def test_a_group_is_given_up_after_its_third_kill() -> None:
    verdicts = judged("misbehave", *["BAD"] * 5, how="exit_process")
    assert [verdict.failure for verdict in verdicts] == ["reward process died"] * 5
    assert ["not judged" in verdict.detail for verdict in verdicts] == [False, False, False, True, True]


@pytest.mark.parametrize("isolate", [True, False])
def test_a_group_reward_judges_all_samples_together(isolate: bool) -> None:
    async def run() -> list[Sequence[Verdict]]:
        spec = HookSpec(name="rollout_user_code:ranks", params={"how": "raise_error"})
        judge = make_group_judge(spec, RewardSection(isolate=isolate))  # pyright: ignore[reportCallIssue]
        groups = [["ccc", "a", "bb"], ["few", "a"], ["BAD", "a"]]
        try:
            await judge.start()
            return [await judge.judge(PROMPT, [sample(text) for text in texts]) for texts in groups]
        finally:
            await judge.close()

    good, few, bad = asyncio.run(run())
    assert good == [Verdict(2.0), Verdict(0.0), Verdict(1.0)]
    assert {verdict.failure for verdict in few} == {"reward malformed"} and len(few) == 2
    assert {verdict.failure for verdict in bad} == {"reward raised"} and "KeyError" in bad[0].detail


def test_a_group_reward_that_must_be_killed_loses_its_group_alone() -> None:
    async def run() -> list[Sequence[Verdict]]:
        pool = RewardPool("rollout_user_code:ranks", {"how": "hang"}, IMPATIENT, group=True)
        try:
            return [await pool.judge(PROMPT, [sample(text) for text in texts]) for texts in (["BAD", "a"], ["bb", "a"])]
        finally:
            await pool.close()

    bad, good = asyncio.run(run())
    assert [verdict.failure for verdict in bad] == ["reward timeout"] * 2
    assert good == [Verdict(1.0), Verdict(0.0)]


def test_processes_that_a_quick_call_leaves_are_counted() -> None:
    before = set(psutil.pids())
    good, bad = judged("misbehave", "good", "BAD", how="leave_processes")
    assert good == Verdict(1.0) and bad.failure == "reward processes"
    assert not [pid for pid in psutil.pids() if pid not in before and is_a_stray(pid)]


def is_a_stray(pid: int) -> bool:
    """What the rewards above start besides themselves."""
    try:
        return psutil.Process(pid).cmdline() == ["sleep", "1000"]
    except psutil.NoSuchProcess:
        return False


def is_ours(process: psutil.Process) -> bool:
    """A reward process below this one, or orphaned: other tests at the same time have pools of their own."""
    try:
        parents = [parent.pid for parent in process.parents()]
        is_reward = "miles_rollout.rewards._process" in process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return is_reward and (os.getpid() in parents or parents[:1] == [1])


def test_groups_are_judged_at_the_same_time_and_in_order() -> None:
    async def use(pool: RewardPool) -> None:
        groups = await asyncio.gather(*[pool.judge(PROMPT, [sample("x")] * size) for size in (1, 5, 2)])
        assert [len(group) for group in groups] == [1, 5, 2]

    with_pool(use, "length")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("nowhere:score", "the module cannot be imported"),
        ("rollout_user_code:nothing", "has no 'nothing'"),
        ("rollout_user_code:hang", "must be callable as Reward"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_bad_input(reward: str, words: str) -> None:
    async def run() -> None:
        pool = RewardPool(reward)
        try:
            with pytest.raises(InputError, match=words):
                await pool.start()
        finally:
            await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize("isolate", [True, False])
def test_what_a_reward_needs_is_asked_for_before_the_first_sample(isolate: bool) -> None:
    async def run(**params: Any) -> None:
        spec = HookSpec(name="rollout_user_code:needs_a_key", params=params)
        judge = make_judge(spec, RewardSection(isolate=isolate))  # pyright: ignore[reportCallIssue]
        try:
            await judge.start()
        finally:
            await judge.close()

    asyncio.run(run(key="k"))
    with pytest.raises(InputError, match="no key"):
        asyncio.run(run())


OWNER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_rollout_rewards_pool import PROMPT, sample
from miles_rollout.rewards import PoolSettings, RewardPool

async def main():
    pool = RewardPool("rollout_user_code:misbehave", {"how": "hang"}, PoolSettings(timeout_s=1000.0))
    await pool.start()
    judging = asyncio.ensure_future(pool.judge(PROMPT, [sample("BAD")]))
    await asyncio.sleep(0.2)
    print("judging", flush=True)
    await judging

asyncio.run(main())
"""


def test_dies_with_its_owner() -> None:
    arguments = [sys.executable, "-c", OWNER, str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "judging\n"
        processes = [psutil.Process(pid) for pid in descendants(owner.pid)]
        assert processes
        owner.kill()
    assert not psutil.wait_procs(processes, timeout=5)[1]
