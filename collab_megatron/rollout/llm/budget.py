"""The budget of a run: the cost of the LLM APIs so far, reservations for work in progress, and admission of new work.

A hard cap is kept by admission. A piece of work (a conversation tree, or a conversation of an evaluation or of the data
engine) states the most requests that it may need. It starts only while the cost so far plus the reservations of all
work in progress, in every process of the run, is below the cap. The piece that starts last may exceed the cap, by its
own cost at most. Close to the cap, fewer pieces therefore run at a time.

The price of a call is known only from calls: dollars are reserved at the highest mean price of a finished piece, and at
least at the mean of the run. Until the first piece has finished, a cap in dollars lets one piece run alone. If repeated
requests or more expensive calls exceed the reservations, requests are refused once the cap is exceeded by the cost of
the largest piece.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from functools import partial

from collab_megatron.config.sections import BudgetSection
from collab_megatron.errors import BudgetSpent
from collab_megatron.rollout.journal.store import Journal, Spent

FRESH_S = 1.0  # age at which the journal's totals are read again: other processes write to it too
POLL_S = 0.5  # between two tries to reserve: other processes release reservations too

Costs = Mapping[tuple[str, str], tuple[int, float]]
"""(role, model) -> answered requests, dollars."""
NOTHING = Spent(0, 0.0)


class Reservation:
    """The budget that is set aside for one piece of work, and what the work has cost so far. Held until `release`."""

    def __init__(self, budget: Budget, asked: int, worth: Spent) -> None:
        """`asked`: the most requests that the work should need; `worth`: the amount that is set aside for it."""
        self._budget = budget
        self.asked, self.worth = asked, worth
        self.calls, self.cost_usd = 0, 0.0  # answered so far

    @property
    def left(self) -> Spent:
        """The part that is not spent yet."""
        return Spent(max(0, self.worth.calls - self.calls), max(0.0, self.worth.cost_usd - self.cost_usd))

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Charge the answered requests of this block, and of the tasks that it starts, to this reservation."""
        before = _SPENDING.set(self)
        try:
            yield
        finally:
            _SPENDING.reset(before)

    def release(self) -> None:
        """The work has ended, with or without success."""
        self._budget._released(self)


_SPENDING: ContextVar[Reservation | None] = ContextVar("spending", default=None)


def note_answer(cost_usd: float) -> None:
    """Charge an answered request to the current reservation."""
    reservation = _SPENDING.get()
    if reservation is not None:
        reservation.calls += 1
        reservation.cost_usd += cost_usd


class Budget:
    """Work starts with `reserve` or inside `room`; every request calls `require_room` first. For one thread."""

    def __init__(
        self,
        section: BudgetSection,
        journal: Journal | None,
        own: Callable[[], Costs],
        go_on: str = "set run.resume=true",
    ) -> None:
        """`go_on`: how the run goes on once the cap is raised, for the error message."""
        self._go_on = go_on
        self._section = section
        self._journal = journal
        self._own = own  # this process's counters: the only ones without a journal, and newer than its totals
        self._costs: Costs = {}
        self._own_at_read: tuple[int, float] = (0, 0.0)
        self._read_at = float("-inf")
        self._warned = False
        self._held: set[Reservation] = set()
        self._largest = Spent(0, 0.0)  # largest reservation so far
        self._overrun = 1.0  # most requests of a piece, as a multiple of what it asked for
        self._usd_per_call: float | None = None  # highest mean of a piece
        self._freed = asyncio.Event()

    def costs(self) -> Costs:
        """By role and model; at most FRESH_S old."""
        now = time.monotonic()
        if now - self._read_at >= FRESH_S:
            self._read_at = now
            own = self._own()
            self._own_at_read = _sums(own)
            if self._journal is None:
                self._costs = own
            else:
                self._costs = {name: (spent.calls, spent.cost_usd) for name, spent in self._journal.spent().items()}
        return self._costs

    @property
    def exhausted(self) -> str | None:
        """Once a hard cap is reached: a sentence with the figures and what to do."""
        return self._reached(Spent(*self._totals()))

    def reserve(self, calls: int) -> Reservation | None:
        """A reservation for work that needs at most `calls` requests; release it when the work ends.

        None if there is no room: for the moment, or for good once `exhausted`.
        """
        worth: Spent | None = NOTHING
        if self._capped:
            if self._journal is None:
                worth = self._room_for(calls, Spent(*_sums(self._own())), NOTHING)
            else:
                worth = self._journal.reserve(self._left(), partial(self._room_for, calls))
        if worth is None:
            return None
        self._largest = Spent(max(self._largest.calls, worth.calls), max(self._largest.cost_usd, worth.cost_usd))
        reservation = Reservation(self, calls, worth)
        self._held.add(reservation)
        return reservation

    @asynccontextmanager
    async def room(self, calls: int) -> AsyncIterator[None]:
        """A block of work that needs at most `calls` requests. Waits until other work ends and leaves room for it.

        Raises BudgetSpent once the cap is reached.
        """
        while (reservation := self.reserve(calls)) is None:
            if (spent := self.exhausted) is not None:
                raise BudgetSpent(spent)
            self._freed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), POLL_S)
        try:
            with reservation.spending():
                yield
        finally:
            reservation.release()

    def require_room(self, in_flight: int) -> None:
        """Called before a request is sent, with `in_flight` others.

        Raises BudgetSpent if the cap is exceeded by the cost of a whole piece of work: work in progress costs more than
        was reserved.
        """
        if self._capped and self._largest.calls:
            calls, usd = self._totals()
            beyond = Spent(self._largest.calls, self._largest.cost_usd or math.inf)  # the price is still unknown
            spent = self._reached(Spent(calls + in_flight, usd), beyond)
            if spent is not None:
                raise BudgetSpent(self.exhausted or spent)

    def warnings(self) -> list[str]:
        """A warning, at the first call after a soft cap was passed."""
        section = self._section
        calls, usd = self._totals()
        name, limit = "soft_usd", section.soft_usd
        if limit is None or usd < limit:
            name, limit = "soft_calls", section.soft_calls
            if limit is None or calls < limit:
                return []
        if self._warned:
            return []
        self._warned = True
        return [
            f"the LLM APIs have cost {usd:.2f} dollars in {calls} answered requests, above budget.{name} ({limit:g}); "
            "the run goes on"
        ]

    def metrics(self) -> dict[str, float]:
        """budget/usd_to_date and budget/calls_to_date, in total and by role and model; budget/hard_share of the cap."""
        self._read_at = float("-inf")  # a step may be shorter than FRESH_S
        calls, usd = self._totals()
        section = self._section
        shares = [0.0]
        if section.hard_usd is not None:
            shares.append(usd / section.hard_usd)
        if section.hard_calls is not None:
            shares.append(calls / section.hard_calls)
        named = {
            "budget/usd_to_date": usd,
            "budget/calls_to_date": float(calls),
            "budget/hard_share": max(shares),
        }
        for (role, model), (role_calls, role_usd) in self.costs().items():
            named[f"budget/{role}/{model}/usd_to_date"] = role_usd
            named[f"budget/{role}/{model}/calls_to_date"] = float(role_calls)
        return named

    @property
    def _capped(self) -> bool:
        return self._section.hard_usd is not None or self._section.hard_calls is not None

    def _room_for(self, calls: int, spent: Spent, others: Spent) -> Spent | None:
        """The reservation for work of at most `calls` requests; None if it may not start."""
        section, own = self._section, self._left()
        calls = math.ceil(calls * self._overrun)
        held_calls, held_usd = own.calls + others.calls, own.cost_usd + others.cost_usd
        if section.hard_calls is not None and spent.calls + held_calls >= section.hard_calls:
            return None
        if section.hard_usd is None:
            return Spent(calls, 0.0)
        if spent.cost_usd + held_usd >= section.hard_usd:
            return None
        means = [] if self._usd_per_call is None else [self._usd_per_call]
        if spent.calls >= max(calls, 1):  # fewer calls may all be those of the cheapest role
            means.append(spent.cost_usd / spent.calls)
        if not means and (held_calls or self._held):
            return None
        return Spent(calls, calls * max(means, default=0.0))

    def _left(self) -> Spent:
        """What is left of this process's reservations."""
        left = [reservation.left for reservation in self._held]
        return Spent(sum(each.calls for each in left), sum(each.cost_usd for each in left))

    def _released(self, reservation: Reservation) -> None:
        if reservation not in self._held:
            return
        self._held.remove(reservation)
        if not self._capped:
            return
        self._overrun = max(self._overrun, reservation.calls / max(reservation.asked, 1))
        # a few new calls, as after a resume, may all be those of the most expensive role
        if reservation.calls and 2 * reservation.calls >= reservation.asked:
            self._usd_per_call = max(self._usd_per_call or 0.0, reservation.cost_usd / reservation.calls)
        if self._journal is not None:
            self._journal.reserve(self._left(), lambda spent, others: None)
        self._freed.set()

    def _reached(self, spent: Spent, beyond: Spent = NOTHING) -> str | None:
        section = self._section
        if section.hard_usd is not None and spent.cost_usd >= section.hard_usd + beyond.cost_usd:
            return (
                f"the LLM APIs have cost {spent.cost_usd:.2f} dollars, and budget.hard_usd is {section.hard_usd:g}: "
                f"raise budget.hard_usd and {self._go_on} to go on"
            )
        if section.hard_calls is not None and spent.calls >= section.hard_calls + beyond.calls:
            return (
                f"the LLM APIs have answered {spent.calls} requests, and budget.hard_calls is {section.hard_calls}: "
                f"raise budget.hard_calls and {self._go_on} to go on"
            )
        return None

    def _totals(self) -> tuple[int, float]:
        """Calls and dollars: the totals at the last reading, plus what this process has spent since."""
        calls, usd = _sums(self.costs())
        own_calls, own_usd = _sums(self._own())
        return calls + (own_calls - self._own_at_read[0]), usd + (own_usd - self._own_at_read[1])


def _sums(costs: Costs) -> tuple[int, float]:
    return sum(calls for calls, _ in costs.values()), sum(usd for _, usd in costs.values())
