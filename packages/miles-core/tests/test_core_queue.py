"""The sample queue: nothing is lost, nothing is handed out twice, nobody waits for ever without a cause."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import Group, Prompt, Sample, VersionSpan
from miles_core.queue import SampleQueue


def ids(groups: tuple[Group, ...]) -> list[str]:
    return [group.id for group in groups]


async def conserved(queue: SampleQueue) -> bool:
    counts = await queue.counts()
    return counts.put == counts.waiting + counts.leased + counts.trained + sum(counts.dropped.values())


def test_groups_come_out_in_order_and_are_acknowledged(make_group: Callable[..., Group]):
    async def story() -> None:
        queue = SampleQueue(capacity=4)
        await queue.put([make_group([1], name=name) for name in "abc"])
        lease = await queue.take(2)
        assert ids(lease.groups) == ["a", "b"]
        await queue.acknowledge(lease.id)
        counts = await queue.counts()
        assert (counts.waiting, counts.leased, counts.trained) == (1, 0, 2)

    asyncio.run(story())


def test_released_groups_go_back_to_the_front(make_group: Callable[..., Group]):
    async def story() -> None:
        queue = SampleQueue(capacity=4)
        await queue.put([make_group([1], name=name) for name in "abc"])
        await queue.release((await queue.take(2)).id)
        assert ids((await queue.take(3)).groups) == ["a", "b", "c"]

    asyncio.run(story())


def test_a_lease_ends_once(make_group: Callable[..., Group]):
    async def story() -> None:
        queue = SampleQueue(capacity=4)
        await queue.put([make_group([1])])
        lease = await queue.take(1)
        await queue.acknowledge(lease.id)
        with pytest.raises(KeyError):
            await queue.release(lease.id)

    asyncio.run(story())


def test_put_waits_while_the_queue_is_full(make_group: Callable[..., Group]):
    async def story() -> None:
        queue = SampleQueue(capacity=2)
        putting = asyncio.create_task(queue.put([make_group([1], name=name) for name in "abc"]))
        done, _ = await asyncio.wait({putting}, timeout=0.05)
        assert not done
        assert ids((await queue.take(2)).groups) == ["a", "b"]
        await asyncio.wait_for(putting, 5)
        assert (await queue.counts()).waiting == 1

    asyncio.run(story())


def test_take_waits_for_enough_groups(make_group: Callable[..., Group]):
    async def story() -> None:
        queue = SampleQueue(capacity=2)
        taking = asyncio.create_task(queue.take(2))
        await queue.put([make_group([1], name="a")])
        done, _ = await asyncio.wait({taking}, timeout=0.05)
        assert not done
        await queue.put([make_group([1], name="b")])
        assert ids((await asyncio.wait_for(taking, 5)).groups) == ["a", "b"]

    asyncio.run(story())


def test_a_count_that_can_never_be_met_is_refused():
    with pytest.raises(ValueError, match="count=3 exceeds the queue's capacity of 2"):
        asyncio.run(SampleQueue(capacity=2).take(3))
    with pytest.raises(ValueError, match="capacity=0"):
        SampleQueue(capacity=0)


def test_stale_groups_are_dropped_and_counted_when_taken(make_group: Callable[..., Group]):
    """The samples of the fixture were made by version 3."""

    async def story() -> None:
        queue = SampleQueue(capacity=4, max_staleness=1)
        await queue.put([make_group([1], name="old")])
        taking = asyncio.create_task(queue.take(1, weight_version=5))
        done, _ = await asyncio.wait({taking}, timeout=0.05)
        assert not done
        assert (await queue.counts()).dropped == {"stale": 1}
        taking.cancel()
        await queue.put([make_group([1], name="fresh")])
        assert ids((await queue.take(1, weight_version=4)).groups) == ["fresh"]

    asyncio.run(story())


@given(st.lists(st.tuples(st.sampled_from(["put", "take", "acknowledge", "release"]), st.integers(1, 3)), max_size=40))
def test_no_group_is_lost_or_doubled_whatever_the_order(steps: list[tuple[str, int]]):
    """Any order of calls that need not wait: the sums match, and every group ends in exactly one place."""
    from_fixture = _groups()

    async def story() -> None:
        queue, leases, trained, made = SampleQueue(capacity=5), [], [], 0
        for what, count in steps:
            counts = await queue.counts()
            if what == "put" and counts.waiting + count <= 5:
                await queue.put([from_fixture(str(made + i)) for i in range(count)])
                made += count
            elif what == "take" and counts.waiting >= count:
                leases.append(await queue.take(count))
            elif what == "acknowledge" and leases:
                lease = leases.pop(0)
                trained += ids(lease.groups)
                await queue.acknowledge(lease.id)
            elif what == "release" and leases:
                # A queue may hold more than its capacity for a moment: what was taken is never refused.
                await queue.release(leases.pop().id)
            assert await conserved(queue)
        rest = (await queue.counts()).waiting
        waiting = ids((await queue.take(rest)).groups) if 0 < rest <= 5 else []
        leased = [name for lease in leases for name in ids(lease.groups)]
        if rest <= 5:
            assert sorted(trained + waiting + leased, key=int) == [str(i) for i in range(made)]

    asyncio.run(story())


def _groups() -> Callable[[str], Group]:
    sample = Sample(
        np.zeros(2, np.int32), np.array([False, True]), np.zeros(2, np.float32), (VersionSpan(1, 2, 0),), "stop"
    )
    return lambda name: Group(Prompt(name, ""), (sample,))
