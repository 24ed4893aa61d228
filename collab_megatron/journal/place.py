"""Where in the run a piece of work belongs: says who goes first at a queue, and which step a journal's row is of.

It travels as a context variable, set once for each conversation, so that metrics and clients between the driver and a
queue need not pass it on. asyncio tasks inherit it from the task that started them.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Smaller goes first: older steps before newer ones; within a step the conversations that have most before them."""

    step: int = 0  # training step for which the tree was begun
    depth: int = 0  # turns that were played: the longest way is left where it is smallest


PLACE: ContextVar[Place] = ContextVar("PLACE", default=Place())  # noqa: B039 - it is frozen
