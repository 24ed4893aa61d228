"""Admission: order by place, no slot lost, and a limit that follows what the server can take."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from collab_megatron import limiter as module
from collab_megatron.limiter import Slots
from collab_megatron.run_order import POSITION, RunPosition


def run(body: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(10):
            return await body()

    return asyncio.run(main())


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_waiters_are_served_by_place_then_by_arrival() -> None:
    async def body() -> list[str]:
        slots, served = Slots(1), []

        async def wait(name: str, place: RunPosition) -> None:
            POSITION.set(place)
            async with slots.take():
                served.append(name)

        async with slots.take():
            places = {
                "late": RunPosition(2, 0),
                "deep": RunPosition(1, 3),
                "first": RunPosition(1, 0),
                "second": RunPosition(1, 0),
            }
            tasks = [asyncio.create_task(wait(*item)) for item in places.items()]
            await turns()
            assert slots.waiting == 4
        await asyncio.gather(*tasks)
        assert (slots.used, slots.waiting) == (0, 0)
        return served

    assert run(body) == ["first", "second", "deep", "late"]


def test_a_newcomer_does_not_overtake_a_big_request_of_the_same_place() -> None:
    async def body() -> list[float]:
        slots, served = Slots(10), []

        async def wait(amount: float) -> None:
            async with slots.take(amount):
                served.append(amount)
                await asyncio.sleep(0)

        async with slots.take(6):
            tasks = [asyncio.create_task(wait(amount)) for amount in (8, 1)]
            await turns()
            assert served == []  # 1 would fit beside 6, but 8 would wait for ever
        await asyncio.gather(*tasks)
        return served

    assert run(body) == [8, 1]


def test_a_request_above_the_limit_is_let_in_alone() -> None:
    async def body() -> None:
        slots = Slots(10)
        async with slots.take(25):
            assert slots.used == 25
            small = asyncio.create_task(slots._enter(1))
            await turns()
            assert slots.waiting == 1
        await small
        assert slots.used == 1

    run(body)


@pytest.mark.parametrize("seed", range(5))
def test_cancellation_at_any_moment_loses_no_slot(seed: int) -> None:
    async def body() -> None:
        chance, slots, most = random.Random(seed), Slots(3), 0

        async def work(place: int) -> None:
            nonlocal most
            POSITION.set(RunPosition(place))
            async with slots.take():
                most = max(most, int(slots.used))
                await asyncio.sleep(chance.random() / 1000)

        tasks = [asyncio.create_task(work(chance.randrange(3))) for _ in range(200)]
        for task in chance.sample(tasks, 120):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (slots.used, slots.waiting, slots._queue) == (0, 0, [])
        assert most == 3

    run(body)


def test_a_waiter_cancelled_in_the_moment_of_its_admission_gives_the_slot_on() -> None:
    async def body() -> None:
        slots = Slots(1)
        async with slots.take():
            first = asyncio.create_task(slots._enter(1))
            second = asyncio.create_task(slots._enter(1))
            await turns()
        first.cancel()  # it was admitted by the end of the block, and has not run since
        await second
        assert first.cancelled()
        assert (slots.used, slots.waiting) == (1, 0)

    run(body)


def test_a_cancelled_head_lets_the_next_one_in() -> None:
    async def body() -> None:
        slots = Slots(10)
        async with slots.take(6):
            head, behind = asyncio.create_task(slots._enter(8)), asyncio.create_task(slots._enter(2))
            await turns()
            head.cancel()
            await behind
            assert (slots.used, slots.waiting) == (8, 0)

    run(body)


def test_overload_cuts_once_a_latency_and_successes_grow_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    slots = Slots(10)
    for _ in range(5):
        slots.overloaded()
    assert slots.limit == pytest.approx(7)
    now = 1.0
    slots.overloaded()
    assert slots.limit == pytest.approx(4.9)
    grown = slots.limit
    slots.succeeded()
    assert slots.limit == pytest.approx(grown + 1 / grown)
    for _ in range(200):
        slots.succeeded()
    assert slots.limit == 10
    for second in range(2, 40):
        now = float(second)
        slots.overloaded()
    assert slots.limit == 1


def test_it_stops_growing_when_answers_become_slow() -> None:
    slots = Slots(100)
    slots.limit = 10
    for _ in range(module.WINDOW):
        slots.succeeded(latency_s=1.0)
    fast = slots.limit
    assert fast > 10
    for _ in range(module.WINDOW):
        slots.succeeded(latency_s=4.0)
    full = slots.limit
    for _ in range(module.WINDOW - 1):
        slots.succeeded(latency_s=4.0)
    assert slots.limit == full
    for _ in range(module.WINDOW + 1):
        slots.succeeded(latency_s=1.5)
    assert slots.limit > full


def test_growth_admits_waiters_and_the_ceiling_moves() -> None:
    async def body() -> None:
        slots = Slots(1)
        async with slots.take():
            other = asyncio.create_task(slots._enter(1))
            await turns()
            assert slots.waiting == 1
            slots.set_ceiling(2)
            await other
            assert (slots.limit, slots.used) == (2, 2)
        slots.set_ceiling(1)
        assert slots.limit == 1

    run(body)


def test_a_round_of_successes_makes_room_for_one_more_of_the_same_size() -> None:
    slots = Slots(10_000)
    slots.limit = 5_000
    for _ in range(10):
        slots.succeeded(amount=500)
    assert 5_400 < slots.limit < 5_500
