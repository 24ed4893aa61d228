"""Coroutines that run together and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def run_all(
    coroutines: Iterable[Coroutine[Any, Any, T]],
    *,
    timeout_s: float | None = None,
    late: Callable[[int], T] | None = None,
) -> list[T]:
    """Run the coroutines concurrently and return their results, in order.

    When one fails, or ends cancelled, the others are cancelled, and the first exception is raised once they have ended;
    with asyncio.gather they would run on. Coroutines that are not done after `timeout_s` are cancelled too, and number
    i has the result late(i).
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    if not tasks:
        return []
    failed: list[asyncio.Future[T]] = []  # in order of time
    running = len(tasks)
    ended = asyncio.Event()  # all tasks, or one that failed; asyncio.wait overlooks one that ended cancelled

    def note(task: asyncio.Future[T]) -> None:
        nonlocal running
        running -= 1
        if task.cancelled() or task.exception() is not None:
            failed.append(task)
        if failed or not running:
            ended.set()

    for task in tasks:
        task.add_done_callback(note)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        if failed:
            failed[0].result()  # raises its exception
        if all(task.done() for task in tasks):
            return [task.result() for task in tasks]
        assert late is not None, "a deadline needs a result for those that miss it"
        return [task.result() if task.done() else late(number) for number, task in enumerate(tasks)]
    finally:
        await cancel_all(tasks)


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel the tasks. Waits until all have ended; their results and exceptions are dropped."""
    listed = list(tasks)
    for task in listed:
        task.cancel()
    await asyncio.gather(*listed, return_exceptions=True)
