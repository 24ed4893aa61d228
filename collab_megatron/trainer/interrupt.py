"""Interrupts: on SIGTERM or SIGINT (Ctrl-C at the launcher, scancel, a time limit) a trainer saves and ends.

A signal to any rank counts: rank 0 ends its wait for the driver, and all ranks agree after the step (saving.py). A
second signal ends the process at once, unless it comes within SAME_S of the first. So does the end of the grace time
(train.save_grace_s); the newest checkpoint is then the one before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from collab_megatron.errors import EXIT_INTERRUPTED, Interrupted
from collab_megatron.signals import SAME_S

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """One per rank. Before `install` a signal ends the process at once: there is nothing to save yet."""

    def __init__(self, grace_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """grace_s: the most seconds between the signal and the end of the process."""
        self.asked = False
        self._waiting = self._installed = False
        self._grace_s, self._clock, self._first_s = grace_s, clock, 0.0  # time of the first signal

    def install(self) -> None:
        """Handle signals from now on. Call it in the main thread; more calls change nothing."""
        if not self._installed:
            self._installed = True
            for number in SIGNALS:
                signal.signal(number, self._on_signal)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a signal end the block with Interrupted; at once if the signal came before."""
        try:
            self._waiting = True
            if self.asked:
                raise Interrupted("interrupted")
            yield
        finally:
            self._waiting = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if self._clock() - self._first_s > SAME_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked, self._first_s = True, self._clock()
        timer = threading.Timer(self._grace_s, self._too_late)
        timer.daemon = True  # a process that has saved does not wait for the timer
        timer.start()
        if self._waiting:
            self._waiting = False
            raise Interrupted("interrupted")

    def _too_late(self) -> None:
        """Runs on a timer thread: the main thread may be in a collective that no signal ends."""
        print(
            f"interrupted: the process did not end within {self._grace_s:g} s, and nothing more is saved; raise "
            "train.save_grace_s to give a save more time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_INTERRUPTED)
