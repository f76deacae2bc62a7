import asyncio
import time

import pytest

from miles_core.observe import PhaseClock, Span

P = "perf/time/"


def outermost(times: dict[str, float]) -> float:
    return sum(value for name, value in times.items() if "/" not in name.removeprefix(P) and name != f"{P}step")


def test_outermost_phases_and_the_rest_add_up_to_the_step():
    clock = PhaseClock()
    for _ in range(3):
        with clock.phase("generate"):
            time.sleep(0.002)
        time.sleep(0.001)
        with clock.phase("train"):
            for name in ("logprobs", "update", "update"):
                with clock.phase(name):
                    time.sleep(0.001)
        times = clock.lap()
        names = ("generate", "train", "train/logprobs", "train/update", "rest", "step")
        assert set(times) == {f"{P}{name}" for name in names}
        assert outermost(times) == pytest.approx(times[f"{P}step"], abs=1e-8)
        assert times[f"{P}generate"] >= 0.002 and times[f"{P}rest"] >= 0.001
        assert times[f"{P}train/update"] >= 0.002
        assert times[f"{P}train"] >= times[f"{P}train/logprobs"] + times[f"{P}train/update"]


def test_a_lap_forgets_the_one_before():
    clock = PhaseClock()
    with clock.phase("generate"):
        pass
    clock.lap()
    assert set(clock.lap()) == {f"{P}rest", f"{P}step"}


def test_laps_add_up_to_the_run():
    start = time.perf_counter()
    clock = PhaseClock()
    total = 0.0
    for _ in range(5):
        time.sleep(0.001)
        total += clock.lap()[f"{P}step"]
    assert 0.005 <= total <= time.perf_counter() - start


def test_a_phase_counts_when_its_body_raises():
    clock = PhaseClock()
    with pytest.raises(KeyError), clock.phase("train"), clock.phase("update"):
        raise KeyError
    with clock.phase("push"):
        pass
    assert {f"{P}train", f"{P}train/update", f"{P}push"} <= set(clock.lap())


def test_a_phase_over_the_end_of_a_lap_counts_in_both():
    clock = PhaseClock()
    with clock.phase("generate"):
        time.sleep(0.002)
        first = clock.lap()
        time.sleep(0.002)
    second = clock.lap()
    for times in (first, second):
        assert times[f"{P}generate"] >= 0.002
        assert outermost(times) == pytest.approx(times[f"{P}step"], abs=1e-8)


def test_tasks_at_once_keep_their_own_nesting_and_the_rest_is_when_none_is_open():
    clock = PhaseClock()

    async def worker(name: str) -> None:
        with clock.phase(name):
            await asyncio.sleep(0.002)
            with clock.phase("inner"):
                await asyncio.sleep(0.002)

    async def both() -> None:
        await asyncio.gather(worker("generate"), worker("train"))

    asyncio.run(both())
    time.sleep(0.002)
    times = clock.lap()
    assert {f"{P}generate/inner", f"{P}train/inner"} <= set(times)
    assert times[f"{P}rest"] >= 0.002
    assert times[f"{P}rest"] + max(times[f"{P}generate"], times[f"{P}train"]) <= times[f"{P}step"]


def test_spans_are_told_inner_first_on_the_wall_clock():
    spans: list[Span] = []
    clock = PhaseClock(spans.append)
    before = time.time_ns()
    with clock.phase("train"), clock.phase("update"):
        time.sleep(0.001)
    inner, outer = spans
    assert (inner.name, outer.name) == ("train/update", "train")
    assert outer.start_ns <= inner.start_ns
    assert inner.start_ns + inner.duration_ns <= outer.start_ns + outer.duration_ns
    assert inner.duration_ns >= 1_000_000
    assert abs(outer.start_ns - before) < 60 * 10**9
