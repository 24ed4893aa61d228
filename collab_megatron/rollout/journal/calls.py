"""Who was asked what in a conversation: each call to a user simulator or judge leaves a CallRecord where it is played.

It travels as a context variable, as place.py does: asyncio tasks inherit the list from the conversation that started
them, so metrics and clients in between need not pass it on. Outside of a conversation nothing is kept.
"""

from __future__ import annotations

from contextvars import ContextVar

from collab_megatron.types import CallRecord

CALLS: ContextVar[list[CallRecord] | None] = ContextVar("CALLS", default=None)
METRIC: ContextVar[str] = ContextVar("METRIC", default="")
"""The metric that asks; empty for a user simulator."""


def keep_call(call: CallRecord) -> None:
    """Add a call to the conversation that is played here, if one is."""
    calls = CALLS.get()
    if calls is not None:
        calls.append(call)
