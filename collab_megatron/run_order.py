"""Position of a piece of work in the run: who goes first at a queue, and which step a row of the journal belongs to.

It travels as a context variable, set once for each conversation, so that metrics and clients between the driver and a
queue need not pass it on. asyncio tasks inherit it from the task that started them.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class RunPosition:
    """Smaller goes first: older steps before newer ones; within a step the conversations that have most before them."""

    step: int = 0  # training step for which the tree was begun
    depth: int = 0  # turns that were played: the longest way is left where it is smallest


POSITION: ContextVar[RunPosition] = ContextVar("POSITION", default=RunPosition())  # noqa: B039 - it is frozen
