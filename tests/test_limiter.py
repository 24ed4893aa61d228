"""Adaptive limiter: order by position, no unit lost, and a limit that follows what the server can take."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from collab_megatron import limiter as module
from collab_megatron.limiter import AdaptiveLimiter
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
        limiter, served = AdaptiveLimiter(1), []

        async def wait(name: str, place: RunPosition) -> None:
            POSITION.set(place)
            async with limiter.take():
                served.append(name)

        async with limiter.take():
            places = {
                "late": RunPosition(2, 0),
                "deep": RunPosition(1, 3),
                "first": RunPosition(1, 0),
                "second": RunPosition(1, 0),
            }
            tasks = [asyncio.create_task(wait(*item)) for item in places.items()]
            await turns()
            assert limiter.waiting == 4
        await asyncio.gather(*tasks)
        assert (limiter.used, limiter.waiting) == (0, 0)
        return served

    assert run(body) == ["first", "second", "deep", "late"]


def test_a_newcomer_does_not_overtake_a_big_request_of_the_same_place() -> None:
    async def body() -> list[float]:
        limiter, served = AdaptiveLimiter(10), []

        async def wait(amount: float) -> None:
            async with limiter.take(amount):
                served.append(amount)
                await asyncio.sleep(0)

        async with limiter.take(6):
            tasks = [asyncio.create_task(wait(amount)) for amount in (8, 1)]
            await turns()
            assert served == []  # 1 would fit next to 6, but 8 would wait forever
        await asyncio.gather(*tasks)
        return served

    assert run(body) == [8, 1]


def test_a_request_above_the_limit_is_let_in_alone() -> None:
    async def body() -> None:
        limiter = AdaptiveLimiter(10)
        async with limiter.take(25):
            assert limiter.used == 25
            small = asyncio.create_task(limiter._enter(1))
            await turns()
            assert limiter.waiting == 1
        await small
        assert limiter.used == 1

    run(body)


@pytest.mark.parametrize("seed", range(5))
def test_cancellation_at_any_moment_loses_no_slot(seed: int) -> None:
    async def body() -> None:
        chance, limiter, most = random.Random(seed), AdaptiveLimiter(3), 0

        async def work(place: int) -> None:
            nonlocal most
            POSITION.set(RunPosition(place))
            async with limiter.take():
                most = max(most, int(limiter.used))
                await asyncio.sleep(chance.random() / 1000)

        tasks = [asyncio.create_task(work(chance.randrange(3))) for _ in range(200)]
        for task in chance.sample(tasks, 120):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (limiter.used, limiter.waiting, limiter._queue) == (0, 0, [])
        assert most == 3

    run(body)


def test_a_waiter_cancelled_in_the_moment_of_its_admission_gives_the_slot_on() -> None:
    async def body() -> None:
        limiter = AdaptiveLimiter(1)
        async with limiter.take():
            first = asyncio.create_task(limiter._enter(1))
            second = asyncio.create_task(limiter._enter(1))
            await turns()
        first.cancel()  # it was admitted by the end of the block, and has not run since
        await second
        assert first.cancelled()
        assert (limiter.used, limiter.waiting) == (1, 0)

    run(body)


def test_a_cancelled_head_lets_the_next_one_in() -> None:
    async def body() -> None:
        limiter = AdaptiveLimiter(10)
        async with limiter.take(6):
            head, behind = asyncio.create_task(limiter._enter(8)), asyncio.create_task(limiter._enter(2))
            await turns()
            head.cancel()
            await behind
            assert (limiter.used, limiter.waiting) == (8, 0)

    run(body)


def test_overload_cuts_once_a_latency_and_successes_grow_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    limiter = AdaptiveLimiter(10)
    for _ in range(5):
        limiter.overloaded()
    assert limiter.limit == pytest.approx(7)
    now = 1.0
    limiter.overloaded()
    assert limiter.limit == pytest.approx(4.9)
    grown = limiter.limit
    limiter.succeeded()
    assert limiter.limit == pytest.approx(grown + 1 / grown)
    for _ in range(200):
        limiter.succeeded()
    assert limiter.limit == 10
    for second in range(2, 40):
        now = float(second)
        limiter.overloaded()
    assert limiter.limit == 1


def test_it_stops_growing_when_answers_become_slow() -> None:
    limiter = AdaptiveLimiter(100)
    limiter.limit = 10
    for _ in range(module.WINDOW):
        limiter.succeeded(latency_s=1.0)
    fast = limiter.limit
    assert fast > 10
    for _ in range(module.WINDOW):
        limiter.succeeded(latency_s=4.0)
    full = limiter.limit
    for _ in range(module.WINDOW - 1):
        limiter.succeeded(latency_s=4.0)
    assert limiter.limit == full
    for _ in range(module.WINDOW + 1):
        limiter.succeeded(latency_s=1.5)
    assert limiter.limit > full


def test_growth_admits_waiters_and_the_ceiling_moves() -> None:
    async def body() -> None:
        limiter = AdaptiveLimiter(1)
        async with limiter.take():
            other = asyncio.create_task(limiter._enter(1))
            await turns()
            assert limiter.waiting == 1
            limiter.set_ceiling(2)
            await other
            assert (limiter.limit, limiter.used) == (2, 2)
        limiter.set_ceiling(1)
        assert limiter.limit == 1

    run(body)


def test_a_round_of_successes_makes_room_for_one_more_of_the_same_size() -> None:
    limiter = AdaptiveLimiter(10_000)
    limiter.limit = 5_000
    for _ in range(10):
        limiter.succeeded(amount=500)
    assert 5_400 < limiter.limit < 5_500
