"""Finds processes that a signal has stopped (SIGSTOP, Ctrl-Z, a job manager's suspend).

A stopped process keeps its memory, and the kernel still accepts connections for its sockets, so its peers notice
nothing. Its state is in /proc, which is cheap to read for any process: a server, one of its ranks, a trainer rank, a
driver. A process that a debugger holds (state t) does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_S = 1.0
LONGEST_LOOK_S = 5.0
"""One look adds at most this: when our own process was stopped too (a suspended job), all continue together."""


@dataclass(frozen=True)
class ProcessStat:
    """One process as /proc reports it."""

    pid: int
    name: str  # command name, at most 15 characters
    state: str  # R running, S and D waiting, T stopped, Z and X ended
    group: int


def all_processes() -> Iterator[ProcessStat]:
    """Every process of this machine that is visible to us."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = file.read_text(errors="replace").rpartition(")")
        except OSError:
            continue  # it has just ended
        state, _, group = rest.split()[:3]
        pid, _, name = head.partition(" (")
        yield ProcessStat(int(pid), name, state, int(group))


class StoppedWatch:
    """Measures how long processes have been stopped."""

    def __init__(
        self,
        limit_s: float,
        *,
        look: Callable[[], Iterable[ProcessStat]] = all_processes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_s, self._look, self._clock = limit_s, look, clock
        self._looked = float("-inf")
        self._stopped_s: dict[int, float] = {}

    def over(self, groups: Iterable[int]) -> dict[int, str]:
        """Process group -> why it is given up: a process of it has been stopped for `limit_s` or longer. Reads /proc at
        most every LOOK_EVERY_S; empty in between."""
        now = self._clock()
        passed_s = min(now - self._looked, LONGEST_LOOK_S)
        if passed_s < LOOK_EVERY_S:
            return {}
        self._looked = now
        wanted = set(groups)
        stopped = [process for process in self._look() if process.state == "T" and process.group in wanted]
        # the time before the first look is unknown
        self._stopped_s = {
            process.pid: self._stopped_s[process.pid] + passed_s if process.pid in self._stopped_s else 0.0
            for process in stopped
        }
        return {
            process.group: f"process {process.pid} ({process.name}) has been stopped by a signal for "
            f"{self._stopped_s[process.pid]:.0f} s (run.stopped_timeout_s={self._limit_s:g})"
            for process in stopped
            if self._stopped_s[process.pid] >= self._limit_s
        }
