"""What the LLM APIs have cost, over the whole run, and whether that is the end of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from collab_megatron.config.sections import BudgetSection
from collab_megatron.journal.store import Journal

FRESH_S = 1.0  # the journal's totals are read again after so long: other driver processes write to it too

Costs = Mapping[tuple[str, str], tuple[int, float]]
"""(role, model) -> answered requests, dollars."""


class Budget:
    """Refuses nothing itself: who begins conversations asks `exhausted` before it begins another."""

    def __init__(
        self,
        section: BudgetSection,
        journal: Journal | None,
        own: Callable[[], Costs],
        go_on: str = "set run.resume=true",
    ) -> None:
        """`go_on`: what the user does, once the cap is raised, to go on."""
        self._go_on = go_on
        self._section = section
        self._journal = journal
        self._own = own  # this process's counters: all there is without a journal, and newer than its totals
        self._costs: Costs = {}
        self._own_at_read: tuple[int, float] = (0, 0.0)
        self._read_at = float("-inf")
        self._warned = False

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
        """Once a hard cap is reached: a sentence with the figures and the way out."""
        section = self._section
        calls, usd = self._totals()
        if section.hard_usd is not None and usd >= section.hard_usd:
            return (
                f"the LLM APIs have cost {usd:.2f} dollars, and budget.hard_usd is {section.hard_usd:g}: "
                f"raise budget.hard_usd and {self._go_on} to go on"
            )
        if section.hard_calls is not None and calls >= section.hard_calls:
            return (
                f"the LLM APIs have answered {calls} requests, and budget.hard_calls is {section.hard_calls}: "
                f"raise budget.hard_calls and {self._go_on} to go on"
            )
        return None

    def warnings(self) -> list[str]:
        """A sentence for the terminal, the first time that it is asked for after a soft cap was passed."""
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
            f"the LLM APIs have cost {usd:.2f} dollars in {calls} answered requests: budget.{name} ({limit:g}) is "
            "passed; the run goes on"
        ]

    def metrics(self) -> dict[str, float]:
        """budget/usd_to_date, budget/calls_to_date, both by role and model too, and budget/hard_share (1: used up)."""
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

    def _totals(self) -> tuple[int, float]:
        """Calls and dollars: what stood there at the last reading, and what this process has spent since."""
        calls, usd = _sums(self.costs())
        own_calls, own_usd = _sums(self._own())
        return calls + own_calls - self._own_at_read[0], usd + own_usd - self._own_at_read[1]


def _sums(costs: Costs) -> tuple[int, float]:
    return sum(calls for calls, _ in costs.values()), sum(usd for _, usd in costs.values())
