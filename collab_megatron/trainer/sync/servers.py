"""The servers of a sync, seen from rank 0: all are asked at the same time, and those that fail are given up.

There is no way back for a server but the next sync: who is live is what the last sync has reached.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

from collab_megatron.engine.control import EngineControl, Gone, Refused, Silent
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import NoEngineLeft, RunError, masked
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.wire.roster import EngineEntry, RosterFolder

T = TypeVar("T")
ANSWER_S = 10.0
"""A server whose HTTP side does not say who it is for so long hangs."""
RELEASE_S = 20.0
"""How long a server that waited for a dead one may take to notice that it is dead."""
LOOK_EVERY_S = 0.5


class EnginesLost(RunError):
    """Servers were given up in the middle of a sync: it has to start over with the others."""


@dataclass(frozen=True)
class Round(Generic[T]):
    """One call to all members, under way."""

    receivers: Receivers
    what: str
    futures: Mapping[Future[T], EngineEntry]

    @property
    def over(self) -> bool:
        """Whether all have answered, well or not."""
        return all(future.done() for future in self.futures)

    def finish(self, on_failure: Callable[[], None]) -> Mapping[EngineEntry, T]:
        """The answers, as Receivers.each gives them; it raises what that raises."""
        done, late = wait(self.futures, timeout=self.receivers.timeout_s, return_when=FIRST_EXCEPTION)
        if not late and all(future.exception() is None for future in done):
            return {entry: future.result() for future, entry in self.futures.items()}
        on_failure()
        self.receivers.judge(self.what, self.futures)
        raise EnginesLost(f"{self.what}: servers were lost")


class Receivers:
    """For the trainer's rank 0."""

    def __init__(
        self, roster: RosterFolder, *, timeout_s: float, wait_s: float, keys: EngineKeys | None = None
    ) -> None:
        """keys: None where the servers ask for none."""
        self._keys = keys
        self._roster = roster
        self.timeout_s = timeout_s
        self._wait_s = wait_s
        self._controls: dict[EngineEntry, EngineControl] = {}
        self._given_up: dict[EngineEntry, str] = {}
        self._news: dict[str, str] = {}
        self.members: tuple[EngineEntry, ...] = ()  # of the attempt in progress
        self.live: tuple[EngineEntry, ...] = ()  # hold the newest weights and may be used

    def find(self) -> tuple[EngineEntry, ...]:
        """Every server that answers now, new ones among them; waits for one if there is none.

        Raises NoEngineLeft after `engine.wait_s`, or at once if none can come any more.
        """
        start = time.monotonic()
        while True:
            roster = self._roster.read()
            asked = [entry for entry in roster.ready if entry.managed is False or entry not in self._given_up]
            answers = self._ask({entry: self.control(entry) for entry in asked})
            for entry in asked:
                if not answers[entry] and entry.managed:
                    self.give_up(entry, f"did not answer within {ANSWER_S:g} s")
            self.members = tuple(entry for entry in asked if answers[entry])
            if self.members:
                return self.members
            waited = time.monotonic() - start
            # those that we have given up stand in the roster until the launcher has seen to them
            pending = any(entry in self._given_up for entry in roster.ready)
            may_come = roster.coming > 0 or pending or any(not entry.managed for entry in asked)
            if not may_come or waited > self._wait_s:
                told = "; ".join(f"{entry}: {reason}" for entry, reason in self._given_up.items())
                how = f"none came within {self._wait_s:g} s" if may_come else "none is left to start"
                raise NoEngineLeft(f"no engine is left, and {how} ({told or 'no server was ever ready'})")
            time.sleep(LOOK_EVERY_S)

    def control(self, entry: EngineEntry) -> EngineControl:
        if entry not in self._controls:
            self._controls[entry] = EngineControl(entry.url, timeout_s=self.timeout_s, keys=self._keys)
        return self._controls[entry]

    def give_up(self, entry: EngineEntry, reason: str) -> None:
        """Never use this life of a server again; the launcher kills it and starts another."""
        if entry in self._given_up and entry.managed:
            return
        print(masked(f"{entry} is given up: {reason}"), file=sys.stderr, flush=True)
        self._given_up[entry] = reason
        self._news[str(entry)] = reason
        self._roster.condemn(entry, reason)
        self.members = tuple(member for member in self.members if member != entry)
        self.live = tuple(member for member in self.live if member != entry)
        if control := self._controls.pop(entry, None):
            control.close()

    def take_lost(self) -> dict[str, str]:
        """Who was given up since the last call, and why."""
        lost, self._news = self._news, {}
        return lost

    def each(
        self,
        what: str,
        call: Callable[[EngineControl, EngineEntry], T],
        *,
        on_failure: Callable[[], None] = lambda: None,
    ) -> Mapping[EngineEntry, T]:
        """Call every member at the same time; their answers.

        `on_failure` is called at the first failure: it must end whatever the others may be waiting for.
        Raises EnginesLost after giving up the servers that are dead or hang; RunError, with the server's words, where
        all are well but one refuses; and what `call` itself raises about an answer, first of all.
        """
        return self.begin(what, call).finish(on_failure)

    def begin(self, what: str, call: Callable[[EngineControl, EngineEntry], T]) -> Round[T]:
        """As `each`, without waiting: `finish` of what is returned does the rest."""
        return Round(
            self,
            what,
            {in_background(f"{what} of {entry}", call, self.control(entry), entry): entry for entry in self.members},
        )

    def judge(self, what: str, futures: Mapping[Future[T], EngineEntry]) -> None:
        """Give up whoever is to blame. Returns if anybody was; else raises what a server refused with. What a call
        raised about an answer is raised in any case."""
        wait(futures, timeout=ANSWER_S)
        blamed = False
        unsure = {}
        for future, entry in futures.items():
            error = future.exception() if future.done() else None
            if isinstance(error, Gone):
                self.give_up(entry, str(error))
                blamed = True
            elif error is not None or not future.done():
                # its own may be in use
                unsure[entry] = EngineControl(entry.url, timeout_s=ANSWER_S, keys=self._keys)
        answers = self._ask(unsure)
        for entry, control in unsure.items():
            control.close()
            if not answers[entry]:
                self.give_up(entry, f"silent during {what}")
                blamed = True
        # with the dead ones out of the way, those that waited for them must come back
        wait(futures, timeout=RELEASE_S if blamed else 0)
        refusals = []
        for future, entry in futures.items():
            if not future.done():
                self.give_up(entry, f"did not come back from {what} within {self.timeout_s:g} s")
                blamed = True
                continue
            error = future.exception()
            if error is None or entry not in self.members:
                continue
            if isinstance(error, Refused):
                refusals.append(error)
            elif isinstance(error, Silent):  # its HTTP side lives, what is behind it does not
                self.give_up(entry, str(error))
                blamed = True
            else:
                raise error  # weights that differ, or a defect of ours: no other server makes up for it
        if not blamed and refusals:
            raise RunError(str(refusals[0]))

    def _ask(self, controls: Mapping[EngineEntry, EngineControl]) -> dict[EngineEntry, bool]:
        """Who answers, all asked at the same time."""
        futures = {
            entry: in_background(f"asking {entry}", control.answers, ANSWER_S) for entry, control in controls.items()
        }
        wait(futures.values(), timeout=ANSWER_S + 1)
        return {entry: future.done() and future.result() for entry, future in futures.items()}

    def close(self) -> None:
        for control in self._controls.values():
            control.close()
        self._controls.clear()
