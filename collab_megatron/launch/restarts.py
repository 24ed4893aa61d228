"""Limits of restarts count failures in a row: a process that fails once a day may fail all through a long run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

STEADY_S = 1800.0
"""A process that lived this long had recovered from its earlier failures."""


@dataclass
class Restarts:
    """Of one process: `begin` at each start, `take` at each failure."""

    limit: int
    count: int = 0  # in a row
    _began: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """The process starts now."""
        self._began = time.monotonic()

    def take(self, *, recovered: bool | None = None) -> bool:
        """Count one more restart; False: the limit was reached before. recovered: begin at zero; None: whether the
        process has lived for STEADY_S."""
        if recovered is None:
            recovered = time.monotonic() - self._began >= STEADY_S
        self.count = 0 if recovered else self.count
        if self.count >= self.limit:
            return False
        self.count += 1
        return True
