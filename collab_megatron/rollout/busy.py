"""Busy clock: for how long at least one call of a kind was in flight."""

from __future__ import annotations

import time
from types import TracebackType


class BusyClock:
    """Wall-clock seconds with one or more open `with clock:` blocks; overlapping blocks count once.

    Not thread-safe: for one event loop or one thread.
    """

    def __init__(self) -> None:
        self._open = 0
        self._since = 0.0
        self._total = 0.0

    def __enter__(self) -> None:
        if self._open == 0:
            self._since = time.monotonic()
        self._open += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open -= 1
        if self._open == 0:
            self._total += time.monotonic() - self._since

    def seconds(self) -> float:
        """Busy seconds so far, including an open block."""
        return self._total + (time.monotonic() - self._since if self._open else 0.0)
