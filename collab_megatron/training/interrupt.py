"""SIGTERM to a trainer (Ctrl-C at the launcher, scancel, a time limit): it saves and ends.

Rank 0 decides, at two places that all ranks pass: while it waits for the driver, and after a step. The other ranks are
told there. A second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from collab_megatron.errors import Interrupted


class Interrupt:
    """Of every rank. Until `install` the signal ends the process at once: there is nothing to save."""

    def __init__(self) -> None:
        self.asked = False
        self._waiting = self._installed = False

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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.asked = True
        if self._waiting:
            self._waiting = False
            raise Interrupted("interrupted")
