"""Steps that get the groups they want: refills, over-sampling, filters, lost samples, and prompts by past success."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_core.data import file_prompts
from miles_core.errors import ContractViolation, InputError, RolloutError
from miles_core.filters import zero_variance
from miles_core.types import Group, Prompt, Sample, VersionSpan
from miles_rollout import GenerateContext, InProcessJudge, LostSample, RolloutWorker, SamplingParams, WorkerSettings
from miles_rollout.curriculum import Curriculum, CurriculumSettings
from miles_rollout.dynamic import DynamicSampling
from miles_rollout.worker import Rollout

TOKENS = np.asarray([1, 2, 3], np.int32)


def prompts(start: int, count: int, dull: Sequence[int] = ()) -> list[Prompt]:
    return [Prompt(f"row{number}", "", {"dull": number in dull}) for number in range(start, start + count)]


def sample(reward: float = float("nan"), **metadata: Any) -> Sample:
    logprobs = -(TOKENS > 1).astype(np.float32)
    return Sample(TOKENS, TOKENS > 1, logprobs, (VersionSpan(1, 3, 0),), "stop", reward=reward, metadata=metadata)


class Generate:
    """Waits as long as it is told, and keeps who was ended early."""

    def __init__(self, waits: dict[str, float] | None = None):
        self.waits, self.ended = waits or {}, list[str]()

    async def __call__(self, prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample]:
        try:
            await asyncio.sleep(self.waits.get(prompt.id, 0.0))
        except asyncio.CancelledError:
            self.ended.append(prompt.id)
            raise
        return [sample(seed=seed) for seed in seeds]


def reward(prompt: Prompt, sample: Sample) -> float:
    return 1.0 if prompt.metadata["dull"] else float(sample.metadata["seed"] % 1000)


class Closable:
    async def close(self) -> None:
        pass


def make(given: Sequence[Prompt], generate: Any, *, dynamic: DynamicSampling | None = None, **options: Any) -> Rollout:
    async def run() -> Rollout:
        context = GenerateContext(Closable(), None, SamplingParams(4), 0)  # type: ignore[arg-type]
        judge = InProcessJudge(options.pop("reward", reward), "reward")
        settings = WorkerSettings(options.pop("group_size", 4), deadline_s=options.pop("deadline_s", 60.0))
        worker = RolloutWorker(context, judge, settings, generate, **options)
        return await worker.rollout(given, step=0, weight_version=0, dynamic=dynamic)

    return asyncio.run(run())


def more(dull: Sequence[int], start: int, end: int = 10**9) -> Any:
    cursor = [start]

    async def take(count: int) -> list[Prompt]:
        taken = prompts(cursor[0], min(count, end - cursor[0]), dull)
        cursor[0] += len(taken)
        return taken

    return take


def test_groups_of_no_variance_are_made_up_for() -> None:
    dull = [1, 2, 4, 5]
    dynamic = DynamicSampling(4, more(dull, 4), max_prompts=100)
    made = make(prompts(0, 4, dull), Generate(), dynamic=dynamic, sample_filter=zero_variance)
    assert [group.id for group in made.groups] == ["row0", "row3", "row6", "row7"]
    assert [(item.prompt_id, item.reason) for item in made.dropped] == [
        (f"row{number}", "zero variance") for number in dull
    ]
    assert made.refilled == 4 and made.metrics["rollout/refilled"] == 4
    assert made.metrics["rollout/dropped/zero variance"] == 4 == made.metrics["rollout/dropped"]
    assert made.rewards["row1"] == (1.0,) * 4 and len(made.rewards) == 8


@settings(max_examples=40, deadline=None)
@given(dull=st.sets(st.integers(0, 11)), order=st.permutations(range(16)))
def test_who_is_ready_first_does_not_decide_what_is_made(dull: set[int], order: list[int]) -> None:
    """The first prompts that have three groups to keep among them, with the seeds of their places."""
    waits = {f"row{number}": 0.001 * place for number, place in enumerate(order)}
    dynamic = DynamicSampling(3, more(list(dull), 3), max_prompts=16)
    made = make(prompts(0, 3, list(dull)), Generate(waits), dynamic=dynamic, sample_filter=zero_variance)
    wanted = [number for number in range(16) if number not in dull][:3]
    assert [group.id for group in made.groups] == [f"row{number}" for number in wanted]
    assert len(made.groups) + len(made.dropped) == wanted[-1] + 1
    again = make(prompts(0, 16, list(dull)), Generate(), sample_filter=zero_variance)
    by_id = {group.id: group.rewards.tolist() for group in again.groups}
    assert all(group.rewards.tolist() == by_id[group.id] for group in made.groups)


def test_the_rest_is_ended_when_there_are_enough() -> None:
    generate = Generate({"row1": 60.0, "row4": 60.0})
    made = make(prompts(0, 6), generate, dynamic=DynamicSampling(3))
    assert [group.id for group in made.groups] == ["row0", "row2", "row3"]
    assert [(item.prompt_id, item.reason) for item in made.dropped] == [
        (name, "over-sampled") for name in ("row1", "row4", "row5")
    ]
    assert sorted(generate.ended) == ["row1", "row4"]
    assert made.dropped[2].rewards and not made.dropped[0].rewards  # what was judged is known to a curriculum


def test_refills_end() -> None:
    everything = range(1000)
    with pytest.raises(RolloutError, match="20 of 20 dropped because of 'zero variance'"):
        dynamic = DynamicSampling(4, more(everything, 4), max_prompts=20)
        make(prompts(0, 4, everything), Generate(), dynamic=dynamic, sample_filter=zero_variance)
    dynamic = DynamicSampling(4, more([1, 2, 3], 4, end=5), max_prompts=100)  # the data has no more
    made = make(prompts(0, 4, [1, 2, 3]), Generate(), dynamic=dynamic, sample_filter=zero_variance)
    assert [group.id for group in made.groups] == ["row0", "row4"] and made.refilled == 1
    dynamic = DynamicSampling(2, more([], 2), max_prompts=100)  # nothing is taken once it is too late
    made = make(prompts(0, 2), Generate({"row1": 60.0}), dynamic=dynamic, deadline_s=0.3)
    assert made.dropped_reasons == {"rollout deadline": 1} and made.refilled == 0
    for wrong in ({"wanted": 0}, {"wanted": 4, "more": more([], 0), "max_prompts": 3}):
        with pytest.raises(ValueError, match=r"must be at least|needs a group"):
            DynamicSampling(**wrong)


def test_samples_are_lost_one_by_one() -> None:
    async def generate(prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample | LostSample]:
        number = int(prompt.id[3:])
        lost = [LostSample("agent raised", f"try {index}") for index in range(number)]
        return [*(sample(index=index) for index in range(number, len(seeds))), *lost]

    def picky(prompt: Prompt, sample: Sample) -> float:
        if prompt.id == "row0" and sample.metadata["index"] == 3:
            raise ValueError("three")
        return 1.0

    made = make(prompts(0, 5), generate, reward=picky)
    assert [(group.id, len(group.samples)) for group in made.groups] == [("row0", 3), ("row1", 3), ("row2", 2)]
    assert [(item.prompt_id, item.reason, item.detail) for item in made.dropped] == [
        ("row3", "agent raised", "try 0"), ("row4", "agent raised", "try 0")
    ]  # fmt: skip
    assert made.metrics["rollout/lost_samples/reward raised"] == 1
    assert made.metrics["rollout/lost_samples/agent raised"] == 1 + 2 + 3 + 4


def test_a_group_that_nobody_made_is_dropped() -> None:
    async def nothing(prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample]:
        return []

    with pytest.raises(RolloutError, match="'no samples': the generate function returned none"):
        make(prompts(0, 2), nothing)


def test_rewards_of_generate_stand_and_branches_widen_the_group() -> None:
    async def generate(prompt: Prompt, seeds: Sequence[int], context: GenerateContext) -> list[Sample]:
        return [sample(0.25), sample(0.25), sample(seed=3003)]

    (group,) = make(prompts(0, 1), generate).groups
    assert group.rewards.tolist() == [0.25, 0.25, 3.0]


def test_filters_before_and_after_the_reward() -> None:
    judged: list[str] = []

    def score(prompt: Prompt, sample: Sample) -> float:
        judged.append(prompt.id)
        return 1.0

    def before(group: Group) -> str | None:
        assert np.isnan(group.rewards).all()
        return "too easy" if group.id == "row1" else None

    def after(group: Group) -> str | None:
        return "too good" if group.id == "row2" and group.rewards.mean() == 1 else None

    made = make(prompts(0, 4), Generate(), reward=score, filter_before_reward=before, sample_filter=after)
    assert made.dropped_reasons == {"too easy": 1, "too good": 1} and len(made.groups) == 2
    assert "row1" not in judged and made.rewards.keys() == {"row0", "row2", "row3"}


def test_a_rollout_function_of_ones_own() -> None:
    order: list[str] = []

    async def one_by_one(given: Sequence[Prompt], make_group: Any) -> list[Any]:
        outcomes = {}
        for number, prompt in reversed(list(enumerate(given))):
            order.append(prompt.id)
            outcomes[number] = await make_group(prompt, number)
        return [outcomes[number] for number in range(len(given))]

    async def forgets(given: Sequence[Prompt], make_group: Any) -> list[Any]:
        return [await make_group(given[0], 0)]

    made, usual = make(prompts(0, 3), Generate(), rollout=one_by_one), make(prompts(0, 3), Generate())
    assert order == ["row2", "row1", "row0"]
    assert [group.rewards.tolist() for group in made.groups] == [group.rewards.tolist() for group in usual.groups]
    with pytest.raises(ContractViolation, match="must return what make_group gave, one for each prompt"):
        make(prompts(0, 3), Generate(), rollout=forgets)
    with pytest.raises(ValueError, match=r"leave hooks\.rollout out"):
        make(prompts(0, 3), Generate(), rollout=one_by_one, dynamic=DynamicSampling(2))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{number}=", "number": number}) + "\n" for number in range(60)))
    return file_prompts(path, shuffle=False)


def number_of(prompt: Prompt) -> int:
    return prompt.metadata["number"]


def test_prompts_come_by_past_success(rows: Any) -> None:
    """Of 60 rows, 20 are solved half the time: they become most of what is drawn; the others are not given up."""
    source = Curriculum(rows, 60, CurriculumSettings(seed=3))
    seen = np.zeros(60)
    for step in range(60):
        drawn = source(step * 15, 15)
        assert len({number_of(prompt) for prompt in drawn}) == 15
        if step >= 30:
            seen += np.bincount([number_of(prompt) for prompt in drawn], minlength=60)
        solved = {prompt.id: {0: [0.0] * 8, 1: [0.0, 1.0] * 4, 2: [1.0] * 8}[number_of(prompt) % 3] for prompt in drawn}
        source.observe(solved, (step + 1) * 15)
    never, often, always = seen[0::3].sum(), seen[1::3].sum(), seen[2::3].sum()
    assert often > 0.6 * seen.sum() and min(never, always) > 0
    assert np.allclose(source.success[1::3], 0.5) and (source.success[0::3] < 0.1).all()
    metrics = source.metrics()
    assert metrics["curriculum/tried"] == 1.0
    assert metrics["curriculum/solved"] == metrics["curriculum/unsolved"] == 20 / 60


def test_its_state_goes_through_a_checkpoint(rows: Any) -> None:
    source = Curriculum(rows, 60)
    for step in range(5):
        rewards = {prompt.id: [float(number_of(prompt) % 2)] * 4 for prompt in source(step * 8, 8)}
        source.observe(rewards, (step + 1) * 8)
    state = json.loads(json.dumps(source.state()))
    other = Curriculum(rows, 60)
    other.load_state(state)
    ahead = [prompt.id for prompt in source(40, 20)]
    assert [prompt.id for prompt in other(40, 20)] == ahead and other.state() == state
    assert [prompt.id for start in range(40, 60, 5) for prompt in other(start, 5)] == ahead  # in pieces, as refills ask
    assert len(set(ahead)) == 20 and ahead[0].startswith("train:") and ahead[0].endswith("@40")
    with pytest.raises(ValueError, match="positions before 40"):
        source(39, 1)
    with pytest.raises(InputError, match="there is no such row: the source has 3"):
        Curriculum(rows, 3).load_state(state)
    for wrong in ({"floor": 0.0}, {"fade": 1.5}):
        with pytest.raises(InputError, match="curriculum"):
            CurriculumSettings(**wrong)


def test_success_fades(rows: Any) -> None:
    source = Curriculum(rows, 60, CurriculumSettings(fade=0.5))
    (prompt,) = source(0, 1)
    for step in range(20):
        source.observe({prompt.id: [0.0] * 8}, step)
    before = source.success[number_of(prompt)]
    for step in range(20, 26):
        source.observe({prompt.id: [1.0] * 8}, step)
    assert before < 0.05 and source.success[number_of(prompt)] > 0.9


def test_the_worker_feeds_the_curriculum(rows: Any, tmp_path: Path) -> None:
    """Refills come from it, and what was dropped teaches it too."""
    source, cursor = Curriculum(rows, 60), [0]

    def take(count: int) -> list[Prompt]:
        taken = source(cursor[0], count)
        cursor[0] += count
        return taken

    async def take_more(count: int) -> list[Prompt]:
        return take(count)

    def score(prompt: Prompt, sample: Sample) -> float:
        return float(prompt.metadata["number"] % 2 and sample.metadata["seed"] % 2)

    for _ in range(3):
        dynamic = DynamicSampling(5, take_more, max_prompts=60)
        options: dict[str, Any] = {"reward": score, "sample_filter": zero_variance, "group_size": 16}
        made = make(take(5), Generate(), dynamic=dynamic, **options)
        assert len(made.groups) == 5 and all(number_of(group.prompt) % 2 for group in made.groups)
        source.observe(made.rewards, cursor[0])
    assert (source.success[::2] <= 0.5).all() and len(source.state()["rows"]) > 15
