"""Timer of the phases of a step, in wall seconds. In a torch trace a phase is a range of its name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function


class PhaseTimer:
    """`with timer("update"):` adds up; `drain()` returns {"time_s/update": seconds} and starts again at zero."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            with record_function(phase):
                yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - start

    def drain(self) -> dict[str, float]:
        named = {f"time_s/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return named
