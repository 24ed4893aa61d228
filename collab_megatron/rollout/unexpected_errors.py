"""Unexpected exceptions: each costs one future, too many in a step stop the run.

A reply that our code cannot handle must not end all other conversations. It is still a bug, so every traceback is
logged. A bug in the user's own metric is not tolerated, because all scores depend on the metric.
"""

from __future__ import annotations

import logging

from collab_megatron.text import whole_text

logger = logging.getLogger(__name__)

MOST = 3  # the default without a driver config
SHORT_CHARS = 200  # of an exception's text


class UnexpectedErrors:
    """Counts the unexpected exceptions of one driver process since `begin`."""

    def __init__(self, most: int = MOST) -> None:
        self.count = 0
        self._most = most
        self._last = ""

    def begin(self) -> None:
        """Start at 0 again, after a delivered step or a finished evaluation."""
        self.count = 0

    def note(self, error: Exception, where: str) -> str:
        """Log and count an exception; `where`: what it interrupted. Returns its type and text for the record."""
        text = f"{type(error).__name__}: {whole_text(str(error))}"
        self._last = text if len(text) <= SHORT_CHARS else text[:SHORT_CHARS] + "..."
        self.count += 1
        logger.error("%s failed with an unexpected exception", where, exc_info=error)
        return self._last

    def verdict(self) -> str | None:
        """The error that stops the run; None while there are not too many."""
        if self.count <= self._most:
            return None
        return (
            f"{self.count} futures failed with an unexpected exception, more than driver.max_unexpected_errors="
            f"{self._most} allows; the last: {self._last}. The tracebacks are in the driver's log: report the bug, or "
            "raise the limit and resume"
        )
