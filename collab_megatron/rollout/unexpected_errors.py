"""Exceptions that nobody foresaw: one costs its future, too many in a step stop the run.

A reply or a sampled turn that our code cannot bear must not end what everybody else plays. It is a bug all the same, so
each is logged with its traceback. A bug in a metric of the user's own is not forgiven: the scores of all futures depend
on it.
"""

from __future__ import annotations

import logging

from collab_megatron.text import whole_text

logger = logging.getLogger(__name__)

MOST = 3  # where no config says more
SHORT_CHARS = 200  # of an exception's words


class UnexpectedErrors:
    """Counts those of one driver process since `begin`."""

    def __init__(self, most: int = MOST) -> None:
        self.count = 0
        self._most = most
        self._last = ""

    def begin(self) -> None:
        """A step was delivered, or an evaluation ends: what comes next is counted from 0."""
        self.count = 0

    def note(self, error: Exception, where: str) -> str:
        """Log it under `where` it was met and count it. What it is, in a few words for the record."""
        text = f"{type(error).__name__}: {whole_text(str(error))}"
        self._last = text if len(text) <= SHORT_CHARS else text[:SHORT_CHARS] + "..."
        self.count += 1
        logger.error("%s met an exception that nobody foresaw", where, exc_info=error)
        return self._last

    def verdict(self) -> str | None:
        """A sentence that stops the run; None as long as there are not too many."""
        if self.count <= self._most:
            return None
        return (
            f"{self.count} futures met an exception that nobody foresaw, more than driver.max_unexpected_errors="
            f"{self._most} allows; the last: {self._last}. The tracebacks are in the driver's log: report the bug, or "
            "raise the limit and resume"
        )
