"""Position of a piece of work in the run: its priority in queues, and the step that its rows in the journal belong to.

It is a context variable, set once for each conversation, so that the metrics and clients between the driver and a queue
do not pass it on. asyncio tasks inherit it from the task that started them.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class RunPosition:
    """Smaller goes first: older steps before newer ones; within a step, conversations with the most turns to go."""

    step: int = 0  # training step for which the tree was started
    depth: int = 0  # turns played so far


POSITION: ContextVar[RunPosition] = ContextVar("POSITION", default=RunPosition())  # noqa: B039 - it is frozen
