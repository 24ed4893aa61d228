"""SIGTERM or SIGINT to a trainer (Ctrl-C at the launcher, scancel, a time limit): it saves and ends in a grace time.

Any rank's signal counts: rank 0 ends its wait for the driver, and all ranks agree after a step (saving.py). A later
signal ends the process at once; one within SAME_S is the same request. So does the end of the grace time
(train.save_grace_s): the newest checkpoint is then the one before.
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
    """Of every rank. Until `install` a signal ends the process at once: there is nothing to save."""

    def __init__(self, grace_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """grace_s: between the signal and the end of the process, at most."""
        self.asked = False
        self._waiting = self._installed = False
        self._grace_s, self._clock, self._first = grace_s, clock, 0.0  # when the signal came

    def install(self) -> None:
        """In the main thread; any number of times."""
        if not self._installed:
            self._installed = True
            for number in SIGNALS:
                signal.signal(number, self._heard)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait of rank 0 that the signal ends. Raises Interrupted, at once where the signal has come before."""
        try:
            self._waiting = True
            if self.asked:
                raise Interrupted("interrupted")
            yield
        finally:
            self._waiting = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if self._clock() - self._first > SAME_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked, self._first = True, self._clock()
        timer = threading.Timer(self._grace_s, self._too_late)
        timer.daemon = True  # a process that has saved does not wait for it
        timer.start()
        if self._waiting:
            self._waiting = False
            raise Interrupted("interrupted")

    def _too_late(self) -> None:
        """On a thread: the main one may be in a collective that no signal ends."""
        print(
            f"interrupted: nothing more was saved within {self._grace_s:g} s; raise train.save_grace_s to give a save "
            "more time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_INTERRUPTED)
