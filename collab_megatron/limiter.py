"""Adaptive concurrency limiter: waiters are served in run order; the limit shrinks when a server pushes back.

The caller chooses the unit: calls of an API, tokens of an engine. The limit starts at its ceiling. `overloaded` cuts
it by a share; `succeeded` lets it grow by one request of the same size in each round of successes, as TCP finds the
width of a link. When answers become slow, the limit stops growing before the server has to refuse requests.
"""

from __future__ import annotations

import asyncio
import heapq
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from collab_megatron.run_order import POSITION

LOWEST = 1.0  # limit
CUT = 0.7  # share of the limit that remains after an overload
WINDOW = 32  # latencies in one median
WINDOWS = 64  # medians that are remembered; the lowest shows what the server can do
SLOW = 3.0  # times the lowest median: the server is full, and more calls would only queue there
LEAST_GAP_S = 1.0  # between two cuts, however fast the answers are


class AdaptiveLimiter:
    """At most `limit` units in use at a time. Waiters are served by POSITION, then by arrival. For one event loop.

    Small requests do not overtake a big one that is next. A request above the limit is admitted alone.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.used = 0.0
        self.waiting = 0
        self._ceiling = limit
        self._holders = 0
        self._queue: list[tuple[int, int, int, float, asyncio.Future[None]]] = []  # step, depth, arrival, amount
        self._arrivals = 0
        self._latencies_s: list[float] = []
        self._medians_s: deque[float] = deque(maxlen=WINDOWS)
        self._cut_at = float("-inf")

    @asynccontextmanager
    async def take(self, amount: float = 1.0) -> AsyncIterator[None]:
        """Hold `amount` units during the block. Waits for them without a deadline of its own."""
        await self._enter(amount)
        try:
            yield
        finally:
            self._leave(amount)

    def overloaded(self) -> None:
        """The server pushed back. Calls that were in flight together count once: at most one cut per latency."""
        now = time.monotonic()
        if now - self._cut_at >= max(LEAST_GAP_S, self._medians_s[-1] if self._medians_s else 0.0):
            self._cut_at = now
            self.limit = max(min(LOWEST, self._ceiling), self.limit * CUT)

    def succeeded(self, amount: float = 1.0, latency_s: float | None = None) -> None:
        """A request of `amount` units was answered. Its latency, if given, shows whether the server keeps up."""
        if latency_s is not None:
            self._latencies_s.append(latency_s)
            if len(self._latencies_s) >= WINDOW:
                self._medians_s.append(statistics.median(self._latencies_s))
                self._latencies_s.clear()
        if self.limit < self._ceiling and not self._slow:
            self.limit = min(self._ceiling, self.limit + amount * amount / self.limit)
            self._admit()

    def set_ceiling(self, ceiling: float) -> None:
        """Set the highest limit. A limit at the old ceiling moves to the new one."""
        self.limit = ceiling if self.limit >= self._ceiling else min(self.limit, ceiling)
        self._ceiling = ceiling
        self._admit()

    @property
    def _slow(self) -> bool:
        return bool(self._medians_s) and self._medians_s[-1] > SLOW * min(self._medians_s)

    async def _enter(self, amount: float) -> None:
        if not self._queue and self._fits(amount):
            self._hold(amount)
            return
        position = POSITION.get()
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals += 1
        heapq.heappush(self._queue, (position.step, position.depth, self._arrivals, amount, admitted))
        self.waiting += 1
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():  # it was still waiting; the next waiter may fit now
                self.waiting -= 1
                self._admit()
            else:
                self._leave(amount)
            raise

    def _admit(self) -> None:
        while self._queue:
            *_, amount, admitted = self._queue[0]
            if not admitted.done() and not self._fits(amount):
                return
            heapq.heappop(self._queue)
            if not admitted.done():  # done: cancelled while it waited
                self.waiting -= 1
                self._hold(amount)
                admitted.set_result(None)

    def _fits(self, amount: float) -> bool:
        return self._holders == 0 or self.used + amount <= self.limit

    def _hold(self, amount: float) -> None:
        self._holders += 1
        self.used += amount

    def _leave(self, amount: float) -> None:
        self._holders -= 1
        self.used = self.used - amount if self._holders else 0.0  # carries no rounding error on
        self._admit()
