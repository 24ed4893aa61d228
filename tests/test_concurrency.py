"""Coroutines that run together end together."""

from __future__ import annotations

import asyncio

import pytest

from collab_megatron.concurrency import run_all


async def after(seconds: float, result: str, ended: list[str] | None = None) -> str:
    try:
        await asyncio.sleep(seconds)
    finally:
        if ended is not None:
            ended.append(result)
    return result


async def failing(message: str) -> str:
    await asyncio.sleep(0)
    raise RuntimeError(message)


async def test_results_are_in_order() -> None:
    assert await run_all([after(0.02, "a"), after(0, "b")]) == ["a", "b"]
    assert await run_all([]) == []


async def test_the_first_failure_is_raised_after_the_others_have_ended() -> None:
    ended: list[str] = []
    with pytest.raises(RuntimeError, match="number 0"):
        await run_all([after(60, "slow", ended), *(failing(f"number {i}") for i in range(20))])
    assert ended == ["slow"]


async def test_at_the_deadline_late_results_take_their_place() -> None:
    ended: list[str] = []
    results = await run_all(
        [after(0, "a"), after(60, "b", ended)], timeout_s=0.05, late=lambda number: f"late {number}"
    )
    assert results == ["a", "late 1"]
    assert ended == ["b"]


async def test_a_cancelled_caller_leaves_none_behind() -> None:
    ended: list[str] = []
    running = asyncio.ensure_future(run_all([after(60, "a", ended), after(60, "b", ended)]))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(ended) == ["a", "b"]


async def test_a_task_that_ends_cancelled_ends_the_others() -> None:
    async def cancelled() -> str:
        task = asyncio.ensure_future(asyncio.sleep(60))
        task.cancel()
        await task
        return ""

    ended: list[str] = []
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(run_all([cancelled(), after(60, "slow", ended)]), timeout=5)
    assert ended == ["slow"]
