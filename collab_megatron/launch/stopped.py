"""Finds processes that a signal has stopped (SIGSTOP, Ctrl-Z, a job manager's suspend): they hold everything, do
nothing, and nobody hears of it: sockets stay open, and the kernel still accepts connections for them.

The state stands in /proc, so a look is cheap, whatever the process is: a server, one of its ranks, its detokenizer, a
trainer rank, a driver. One that a debugger holds for a moment (state t) does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY_S = 1.0
LONGEST_LOOK_S = 5.0
"""No look counts for more than this: when our own process was stopped too (a suspended job), all go on together."""


@dataclass(frozen=True)
class ProcessStat:
    """One line of /proc."""

    pid: int
    name: str  # as the process calls itself, at most 15 characters
    state: str  # R runs, S and D wait, T is stopped, Z and X have ended
    group: int


def all_processes() -> Iterator[ProcessStat]:
    """Every process of this machine that we may look at."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = file.read_text(errors="replace").rpartition(")")
        except OSError:
            continue  # it ended while we looked
        state, _, group = rest.split()[:3]
        pid, _, name = head.partition(" (")
        yield ProcessStat(int(pid), name, state, int(group))


class StoppedWatch:
    """Remembers for how long a stopped process has been seen stopped."""

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
        """Process group -> a sentence part about its process that was stopped for `limit_s` or longer. Looks at most
        every LOOK_EVERY_S; empty in between."""
        now = self._clock()
        passed_s = min(now - self._looked, LONGEST_LOOK_S)
        if passed_s < LOOK_EVERY_S:
            return {}
        self._looked = now
        wanted = set(groups)
        stopped = [process for process in self._look() if process.state == "T" and process.group in wanted]
        # at the first look nothing is known of the time before it
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
