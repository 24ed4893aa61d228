"""Requests and tokens per minute, kept on our side: a call waits for its turn instead of being refused."""

from __future__ import annotations

import time

BURST_S = 5.0  # so many seconds' worth may go at once: a whole minute's worth would be refused by many providers


class Bucket:
    """A token bucket that is paid first and waited for afterwards, so that nobody is overtaken."""

    def __init__(self, per_minute: float) -> None:
        self._per_s = per_minute / 60.0
        self._burst = max(1.0, self._per_s * BURST_S)
        self._level = self._burst
        self._filled_at = time.monotonic()

    def delay_s(self, amount: float) -> float:
        """Seconds until `amount` may go; one above the burst goes when the bucket is full."""
        self._fill()
        return max(0.0, (min(amount, self._burst) - self._level) / self._per_s)

    def pay(self, amount: float) -> None:
        """Take `amount` out, below zero where need be; negative amounts give back."""
        self._fill()
        self._level = min(self._burst, self._level - amount)

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._filled_at) * self._per_s)
        self._filled_at = now
