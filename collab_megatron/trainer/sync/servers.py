"""The servers of a sync, as rank 0 sees them: one call goes to all of them at the same time, a failed one is given up.

The roster (wire/roster.py) lists the servers that the launcher has running. `members` are those of the current attempt,
`live` those that hold the newest weights. A server that was given up comes back only as a new life in the roster.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Generic, TypeVar

from collab_megatron.engine.client import EngineGone, EngineRefused, EngineSilent
from collab_megatron.engine.control import EngineControl, PauseMode
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import NoEngineLeft, RunError, masked
from collab_megatron.trainer.sync.attempt import Abandoned
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.wire.roster import EngineEntry, RosterFolder

T = TypeVar("T")
Call = Callable[[EngineControl, EngineEntry], T]
ANSWER_S = 10.0
"""Deadline of the HTTP side of a server for a trivial question; one that misses it hangs."""
RELEASE_S = 20.0
"""How long a server that waited for a dead one may take to notice the death."""
READ_ROSTER_EVERY_S = 0.5


class EnginesLost(RunError):
    """Servers were given up during an attempt: start over with the others."""


def _nothing() -> None:
    return


class CallToAll(Generic[T]):
    """One call to every member, in flight."""

    def __init__(self, servers: SyncServers, what: str, call: Call[T]) -> None:
        self._servers, self._what = servers, what
        self._futures = {
            in_background(f"{what} of {entry}", call, servers.control(entry), entry): entry for entry in servers.members
        }

    def settled(self) -> Future[bool]:
        """Done once all have answered, one has failed, or the deadline has passed."""
        return in_background(f"awaiting {self._what}", self._wait)

    def results(self, on_failure: Callable[[], None] = _nothing) -> dict[EngineEntry, T]:
        """Wait for the answers; raises as SyncServers.call_all does."""
        late = self._wait()
        if not late and all(future.exception() is None for future in self._futures):
            return {entry: future.result() for future, entry in self._futures.items()}
        on_failure()
        self._servers.drop_failed(self._what, self._futures)
        raise EnginesLost(f"{self._what}: servers were lost")

    def _wait(self) -> bool:
        """Whether some have not answered when the wait ends."""
        return bool(wait(self._futures, timeout=self._servers.timeout_s, return_when=FIRST_EXCEPTION).not_done)


class SyncServers:
    """For the trainer's rank 0."""

    def __init__(
        self,
        roster: RosterFolder,
        *,
        timeout_s: float,
        wait_s: float,
        pause_mode: PauseMode = "in_place",
        keys: EngineKeys | None = None,
    ) -> None:
        """`timeout_s`: deadline of each call. `wait_s`: how long `find` waits for a first server. `keys`: None where
        the servers ask for none."""
        self.timeout_s = timeout_s
        self._roster, self._wait_s, self._pause_mode, self._keys = roster, wait_s, pause_mode, keys
        self._controls: dict[EngineEntry, EngineControl] = {}
        self._given_up: dict[EngineEntry, str] = {}
        self._lost: dict[str, str] = {}  # since the last take_lost
        self._paused_at: float | None = None
        self.members: tuple[EngineEntry, ...] = ()
        self.live: tuple[EngineEntry, ...] = ()

    # -- who takes part -----------------------------------------------------------------------------------------------

    def find(self) -> tuple[EngineEntry, ...]:
        """Start an attempt: its members are all servers that answer now, new ones included. Waits for one if there is
        none. Raises NoEngineLeft after `wait_s`, or at once if none can come any more."""
        self._paused_at = None
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
            # a server that was given up stays in the roster until the launcher has killed it
            pending = any(entry in self._given_up for entry in roster.ready)
            may_come = roster.coming > 0 or pending or any(not entry.managed for entry in asked)
            if not may_come or waited > self._wait_s:
                reasons = "; ".join(f"{entry}: {reason}" for entry, reason in self._given_up.items())
                how = f"none came within {self._wait_s:g} s" if may_come else "none is left to start"
                raise NoEngineLeft(f"no engine is left, and {how} ({reasons or 'no server was ever ready'})")
            time.sleep(READ_ROSTER_EVERY_S)

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
        self._lost[str(entry)] = reason
        self._roster.condemn(entry, reason)
        self.members = tuple(member for member in self.members if member != entry)
        self.live = tuple(member for member in self.live if member != entry)
        if control := self._controls.pop(entry, None):
            control.close()

    def take_lost(self) -> dict[str, str]:
        """The servers that were given up since the last call, each with its reason."""
        lost, self._lost = self._lost, {}
        return lost

    # -- one call to all ----------------------------------------------------------------------------------------------

    def call_all(self, what: str, call: Call[T], *, on_failure: Callable[[], None] = _nothing) -> dict[EngineEntry, T]:
        """Call every member at the same time and return their answers.

        `on_failure` is called at the first failure: it must end whatever the others may be waiting for.
        Raises EnginesLost after giving up the servers that are dead or hang; EngineRefused where all are well and one
        refuses; and first of all, what `call` itself raises about an answer.
        """
        return self.start(what, call).results(on_failure)

    def call_survivors(self, what: str, call: Call[T]) -> dict[EngineEntry, T]:
        """As `call_all`, repeated without the servers that fail, for calls that stay useful to the others. Raises
        EnginesLost when none is left."""
        while True:
            try:
                return self.call_all(what, call)
            except EnginesLost:
                if not self.members:
                    raise

    def start(self, what: str, call: Call[T]) -> CallToAll[T]:
        """As `call_all`, without waiting for the answers."""
        return CallToAll(self, what, call)

    def drop_failed(self, what: str, futures: Mapping[Future[T], EngineEntry]) -> None:
        """Give up the servers that made a call fail. If there are none, raise a server's refusal, or Abandoned. What a
        call raised about an answer is raised in any case."""
        wait(futures, timeout=ANSWER_S)
        dropped = False
        unsure = {}
        for future, entry in futures.items():
            error = future.exception() if future.done() else None
            if isinstance(error, EngineGone):
                self.give_up(entry, str(error))
                dropped = True
            elif error is not None or not future.done():
                # another connection: the server's own may be in use
                unsure[entry] = EngineControl(entry.url, timeout_s=ANSWER_S, keys=self._keys)
        answers = self._ask(unsure)
        for entry, control in unsure.items():
            control.close()
            if not answers[entry]:
                self.give_up(entry, f"silent during {what}")
                dropped = True
        # once the dead ones are gone, those that waited for them must come back
        wait(futures, timeout=RELEASE_S if dropped else 0)
        errors: list[Exception] = []
        for future, entry in futures.items():
            if not future.done():
                self.give_up(entry, f"did not come back from {what} within {self.timeout_s:g} s")
                dropped = True
                continue
            error = future.exception()
            if error is None or entry not in self.members:
                continue
            if isinstance(error, EngineRefused | Abandoned):
                errors.append(error)
            elif isinstance(error, EngineSilent):  # its HTTP side lives, its scheduler does not
                self.give_up(entry, str(error))
                dropped = True
            else:
                raise error  # weights that differ, or a bug of ours: another server does not help
        if not dropped and errors:
            raise min(errors, key=lambda error: isinstance(error, Abandoned))  # a refusal, if there is one

    def _ask(self, controls: Mapping[EngineEntry, EngineControl]) -> dict[EngineEntry, bool]:
        """Which servers answer; all are asked at the same time."""
        futures = {
            entry: in_background(f"asking {entry}", control.answers, ANSWER_S) for entry, control in controls.items()
        }
        wait(futures.values(), timeout=ANSWER_S + 1)
        return {entry: future.done() and future.result() for entry, future in futures.items()}

    # -- the phases of a sync -----------------------------------------------------------------------------------------

    def pause(self, *, on_failure: Callable[[], None] = _nothing) -> None:
        """Stop generation; a paused server stays paused."""
        mode = self._pause_mode
        self.call_all("pause_generation", lambda control, _: control.pause(mode), on_failure=on_failure)
        self._paused_at = self._paused_at or time.monotonic()

    def begin_update(self, *, on_failure: Callable[[], None] = _nothing) -> None:
        """Open SGLang's update session, in which a server takes tensors."""
        self.call_all("begin_weight_update", lambda control, _: control.begin_update(), on_failure=on_failure)

    def end_update(self) -> None:
        """Close the update session: all tensors are loaded."""
        self.call_survivors("end_weight_update", lambda control, _: control.end_update())

    def flush(self) -> bool:
        """Empty the prefix caches; False where requests in flight kept one. The driver does not depend on it: its cache
        keys hold the weight version."""
        return all(self.call_survivors("flush_cache", lambda control, _: control.flush_cache(timeout_s=0)).values())

    def resume(self) -> float:
        """Let generation go on; seconds since the attempt's first pause."""
        self.call_survivors("continue_generation", lambda control, _: control.resume())
        return 0.0 if self._paused_at is None else time.monotonic() - self._paused_at

    def release_memory(self) -> None:
        """Have all servers abort what they still sample and give their device memory back; they stay paused.

        A server that is asked for its memory while a batch runs ends (sglang 0.5.23, srt/managers/scheduler_components/
        weight_updater.py, asserts). `abort` stops new requests and ends the others, but the scheduler may still have a
        batch in its overlapped loop: only a flush tells that it is idle.
        """

        def release(control: EngineControl, entry: EngineEntry) -> None:
            control.pause("abort")
            if not control.flush_cache(timeout_s=self.timeout_s / 2):
                raise EngineSilent(f"{entry} is still busy {self.timeout_s / 2:g} s after its requests were aborted")
            control.release_memory(["kv_cache", "weights"])

        self.call_survivors("release_memory_occupation", release)

    def close(self) -> None:
        for control in self._controls.values():
            control.close()
        self._controls.clear()
