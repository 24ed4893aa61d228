"""SIGTERM to a trainer (Ctrl-C at the launcher, scancel, a time limit): it saves and ends.

Rank 0 decides, at two places that all ranks pass: while it waits for the driver, and after a step. The other ranks are
told there. A later signal ends the process at once; one within SAME_S is the same request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from collab_megatron.errors import Interrupted

SAME_S = 10.0
"""Slurm's proctrack/linuxproc, systemd and a shutdown signal every process of a job, and the launcher, signalled too,
passes its own signal on: a trainer that ended at the second one would lose what it is saving."""


class Interrupt:
    """Of every rank. Until `install` the signal ends the process at once: there is nothing to save."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = False
        self._waiting = self._installed = False
        self._clock, self._first = clock, 0.0  # when the signal came

    def install(self) -> None:
        """In the main thread; any number of times."""
        if not self._installed:
            self._installed = True
            signal.signal(signal.SIGTERM, self._heard)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait of rank 0 that the signal ends. Raises Interrupted, at once where the signal has come before."""
        if self.asked:
            raise Interrupted("interrupted")
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if self._clock() - self._first > SAME_S:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        self.asked, self._first = True, self._clock()
        if self._waiting:
            self._waiting = False
            raise Interrupted("interrupted")
