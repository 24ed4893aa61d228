"""Accounting of LLM calls: counters by role, their growth over a step, and the record of each call of a conversation.

The record is kept in context variables, like the run position (run_order.py): asyncio tasks inherit the list of the
conversation that started them, so the metrics and clients in between do not pass it on. Outside of a conversation no
record is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields

from collab_megatron.types import CallRecord

API_USAGE_FILE = "api_usage.json"
"""The final counters of a process, for the totals of a run."""

CALLS: ContextVar[list[CallRecord] | None] = ContextVar("CALLS", default=None)
"""The calls of the current conversation so far."""
METRIC: ContextVar[str] = ContextVar("METRIC", default="")
"""The metric that makes the call; empty for a user simulator."""

GAUGES = ("in_flight", "slots", "waiting")
MALFORMED = ("empty", "wrong_role", "too_long", "unreadable")


@dataclass
class RoleUsage:
    """Counters of one role since the gateway was made. Answers from the journal count in `replayed` only,
    those of equal requests in `shared` only."""

    calls: int = 0  # complete() calls that sent a request
    attempts: int = 0  # requests sent, retries included
    retries: int = 0  # attempts after the first of a call
    answers: int = 0  # requests that were answered, and paid for; malformed answers included
    replayed: int = 0  # answers from the journal
    shared: int = 0  # calls that got the answer of an equal request at temperature 0
    failures: int = 0  # calls that ended in SimulatorError
    rate_limited: int = 0  # attempts that ended in 429
    server_errors: int = 0  # 5xx
    rejected: int = 0  # any other 4xx
    timeouts: int = 0  # no whole answer within timeout_s
    connection_errors: int = 0  # refused, reset, hung up
    bad_bodies: int = 0  # status 200 with truncated JSON, HTML, or no completion
    cancelled: int = 0  # attempts whose result is no longer needed: the future timed out, or another metric failed
    malformed: int = 0  # answers, replayed ones too, that could not be used: the sum of the next four
    empty: int = 0
    wrong_role: int = 0  # a choice whose role is not assistant
    too_long: int = 0  # neither parsed nor stored
    unreadable: int = 0  # refused by the caller's `parse`
    failovers: int = 0  # attempts that went to another deployment at once
    cooldowns: int = 0  # times that a deployment began to cool down
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    wait_s: float = 0.0  # in requests and back-off, summed over calls
    queue_s: float = 0.0  # in the queue of the concurrency limiter, summed over calls
    paced_s: float = 0.0  # waiting for limits per minute and for Retry-After, summed over calls
    in_flight: int = 0  # gauge: requests at this moment
    slots: float = 0.0  # gauge: the current limit of the concurrency limiter
    waiting: int = 0  # gauge: calls in its queue

    def add(self, counter: str) -> None:
        """One more of a field by name."""
        setattr(self, counter, getattr(self, counter) + 1)
        self.malformed += counter in MALFORMED

    def copy(self) -> RoleUsage:
        return RoleUsage(**{f.name: getattr(self, f.name) for f in fields(self)})

    def since(self, before: RoleUsage) -> RoleUsage:
        """The growth of the counters since `before`, with the current gauges."""
        grown = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return RoleUsage(**{**grown, **{gauge: getattr(self, gauge) for gauge in GAUGES}})


@dataclass(frozen=True)
class GatewaySnapshot:
    """All roles at one moment. Subtract an earlier snapshot to get the growth in between."""

    roles: Mapping[str, RoleUsage] = field(default_factory=dict)

    def __sub__(self, before: GatewaySnapshot) -> GatewaySnapshot:
        zero = RoleUsage()
        return GatewaySnapshot({name: usage.since(before.roles.get(name, zero)) for name, usage in self.roles.items()})

    @property
    def cost_usd(self) -> float:
        return sum(usage.cost_usd for usage in self.roles.values())

    def metrics(self) -> dict[str, float]:
        """Values by dashboard name: `simulator/user/calls`, ..., and `simulator/cost_usd` over all roles."""
        named = {
            f"simulator/{role}/{f.name}": float(getattr(usage, f.name))
            for role, usage in self.roles.items()
            for f in fields(usage)
        }
        named["simulator/cost_usd"] = self.cost_usd
        return named


def keep_call(call: CallRecord) -> None:
    """Add a call to the current conversation, if there is one."""
    calls = CALLS.get()
    if calls is not None:
        calls.append(call)
