"""What trainer and driver say to each other: msgpack over ZeroMQ, a socket for each shard (its other end: listener.py).

Every request carries the run's token, which stands in a file that only this user can read: a request without it is not
answered.

A request for work is asked again every POLL_S until it is done, so that neither side ever waits in silence: the trainer
notices a dead driver within seconds, and a deadline names what was being waited for. A driver that died and was started
again listens at the same address and is asked again; the same request may be asked any number of times.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import msgspec
import zmq
from msgspec import structs

from collab_megatron.errors import (
    BudgetSpent,
    EvaluationFailed,
    NoEngineLeft,
    RunError,
    SimulatorSick,
    TooManyErrors,
)
from collab_megatron.figures import Figure, merged, values
from collab_megatron.text import whole_text
from collab_megatron.types import RolloutBatch, TrainingSample

POLL_S = 2.0
"""How long the driver holds a request before it answers "not yet"."""
ASK_AGAIN_S = 15.0
"""After so much silence the request was lost: far above POLL_S, since the driver's loop may be busy."""
SILENT_S = 120.0
"""How long the trainer asks a driver that does not answer: it may be being started again."""
WHY_STOP = {"budget": BudgetSpent, "health": SimulatorSick, "errors": TooManyErrors}
LOST_CONVERSATIONS = "held-out conversations failed"
LOST_SHARE_LIMIT = 0.5
"""A step or evaluation that lost more than this share of its work, over all shards, fails: its figures would mean
nothing."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Request(msgspec.Struct):
    """Asked by the trainer's rank 0."""

    op: Literal["step", "evaluate", "discard", "stop"]  # discard: the batch of `step` was refused, make it again
    step: int = 0  # optimizer steps that the live weights have behind them; what users read counts from 1
    version: int = 0  # weight version that is live in the engines
    engines: tuple[str, ...] = ()  # URLs of the servers that hold it; no others may be asked
    saved: int = 0  # steps that the newest complete checkpoint holds


class Tally(msgspec.Struct, frozen=True):
    """How much of its share of the work a shard lost."""

    of: int = 0  # groups of a step, conversations of an evaluation
    lost: int = 0  # of them, those that were dropped or failed
    why: str = ""  # what went wrong with one of them

    def __post_init__(self) -> None:
        structs.force_setattr(self, "why", whole_text(self.why))  # a provider's words may stand in it


class Answer(msgspec.Struct):
    """Given by the driver: pending, an error, or figures, for a step with its samples."""

    pending: bool = False
    samples: tuple[TrainingSample, ...] = ()
    figures: dict[str, Figure] = {}
    error: str = ""
    no_engine: bool = False  # the error is that no engine is left: the same may be asked again, with others
    stop: Literal["", "budget", "health", "errors"] = ""  # the error is that the run must not go on
    notes: tuple[str, ...] = ()  # for the terminal
    lost: dict[str, str] = {}  # engines that were given up while this was worked on: URL -> reason
    tally: Tally = Tally()

    def __post_init__(self) -> None:
        """Providers and LLMs have a say in the texts: half a surrogate pair of theirs could not be sent."""
        self.error, self.notes = whole_text(self.error), tuple(map(whole_text, self.notes))
        self.lost = {url: whole_text(why) for url, why in self.lost.items()}


@dataclass(frozen=True)
class DriverResult(Generic[T]):
    """What was asked for, what the user should hear, and the engines that were given up on the way."""

    content: T
    lost: dict[str, str]  # URL -> reason
    notes: tuple[str, ...] = ()


class DriverHasNoEngine(NoEngineLeft):
    """The driver gave every engine up; the same may be asked for again, with others."""

    def __init__(self, message: str, lost: dict[str, str]) -> None:
        super().__init__(message)
        self.lost = lost  # URL -> reason


class DriverClient:
    """The trainer's end: every shard is asked, and what they answer becomes one. Not for threads."""

    def __init__(self, addresses: Sequence[str], token: bytes) -> None:
        self._context = zmq.Context()
        self._lines = [_Line(self._context, address, token) for address in addresses]

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._context.term()

    def next_batch(
        self, step: int, version: int, engines: Sequence[str], *, saved: int = 0, timeout_s: float
    ) -> DriverResult[RolloutBatch]:
        """The finished groups of `step`, sampled by `engines`, all of which hold `version`.

        Raises RunError at the deadline, with the driver's own error, or when the shards together had to drop over half
        of the groups; DriverHasNoEngine when all engines were given up; BudgetSpent, SimulatorSick or TooManyErrors
        where the run must stop.
        """
        request = Request("step", step, version, tuple(engines), saved)
        answers = self._ask_all(request, f"the rollouts of step {step + 1}", timeout_s)
        try:
            require_most([answer.tally for answer in answers], f"groups of step {step + 1} had to be dropped")
        except RunError:
            self._discard(step)
            raise
        samples = tuple(sample for answer in answers for sample in answer.samples)
        result = _result(RolloutBatch(step, samples, _values(answers)), answers)
        if samples:
            return result
        note = (
            f"step {step + 1}: no group has spread and algorithm.zero_advantage is drop, so no optimizer step is taken"
        )
        return replace(result, notes=(*result.notes, note))

    def _discard(self, step: int) -> None:
        """Have the refused batch of `step` made again: the journal would hand it to every attempt to resume. Raises
        nothing: why it was refused is the news."""
        try:
            self._ask_all(Request("discard", step), f"the removal of the refused batch of step {step + 1}", SILENT_S)
        except RunError as failure:
            logger.warning("the refused batch of step %d stays in the journal: %s", step + 1, failure)

    def evaluate(
        self, step: int, version: int, engines: Sequence[str], *, timeout_s: float
    ) -> DriverResult[dict[str, float]]:
        """Held-out figures under the live weights. Raises as `next_batch` does, of conversations instead of groups."""
        request = Request("evaluate", step, version, tuple(engines))
        answers = self._ask_all(request, f"the evaluation after step {step}", timeout_s)
        require_most([answer.tally for answer in answers], LOST_CONVERSATIONS, EvaluationFailed)
        return _result(_values(answers), answers)

    def stop(self) -> None:
        """Ask the driver to end; it answers before it does."""
        self._ask_all(Request("stop"), "the driver's end", SILENT_S)

    def _ask_all(self, request: Request, what: str, timeout_s: float) -> list[Answer]:
        """Every shard's final answer. Raises what the first of them says that goes wrong."""
        payload = msgspec.msgpack.encode(request)
        deadline = time.monotonic() + timeout_s
        poller = zmq.Poller()
        for line in self._lines:
            line.ask(payload)
        answers: dict[_Line, Answer] = {}
        while len(answers) < len(self._lines):
            waiting = [line for line in self._lines if line not in answers]
            for line in waiting:
                poller.register(line.socket, zmq.POLLIN)
            ready = dict(poller.poll(int(POLL_S * 1000)))
            for line in waiting:
                poller.unregister(line.socket)
                if line.socket not in ready:
                    line.ask_again_after_silence(payload, what)
                    continue
                answer = line.take()
                _raise_for(answer)
                if answer.pending:
                    line.ask(payload)
                else:
                    answers[line] = answer
            if len(answers) < len(self._lines) and time.monotonic() > deadline:
                for line in self._lines:
                    line.forget()
                raise RunError(f"trainer rank 0 waited over {timeout_s:g} s for {what}")
        return [answers[line] for line in self._lines]


class _Line:
    """The socket to one shard."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, token: bytes) -> None:
        self._context, self._address, self._token = context, address, token
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._asked = self._heard = time.monotonic()
        self._owed = False  # an answer is under way
        self._connect()

    def _connect(self) -> None:
        self.socket = self._context.socket(zmq.REQ)
        self.socket.linger = 0  # a client that is dropped unclosed must not keep the process from ending
        self.socket.connect(self._address)

    def ask(self, payload: bytes) -> None:
        if self._owed:  # another shard's answer ended an earlier request
            self.forget()
        self.socket.send_multipart([self._token, payload])
        self._owed = True
        self._asked = self._heard = time.monotonic()

    def take(self) -> Answer:
        self._owed = False
        self._heard = time.monotonic()
        return self._decoder.decode(self.socket.recv())

    def ask_again_after_silence(self, payload: bytes, what: str) -> None:
        """Raises RunError after SILENT_S."""
        now, heard = time.monotonic(), self._heard
        if now - heard > SILENT_S:
            raise RunError(f"trainer rank 0: driver {self._address} is silent while waiting for {what}")
        if now - self._asked > ASK_AGAIN_S:
            self.ask(payload)
            self._heard = heard

    def forget(self) -> None:
        """Give up the answer that is owed: a REQ socket cannot be asked before it has come."""
        if self._owed:
            self.close()
            self._connect()
            self._owed = False

    def close(self) -> None:
        self.socket.close()


def _raise_for(answer: Answer) -> None:
    if answer.no_engine:
        raise DriverHasNoEngine(answer.error, answer.lost)
    if answer.stop:
        raise WHY_STOP[answer.stop](answer.error)
    if answer.error:
        raise RunError(answer.error)


def require_most(tallies: Sequence[Tally], what: str, kind: type[RunError] = RunError) -> None:
    """Raises `kind`, "5 of 8 `what`", if all shards together lost more than the share LOST_SHARE_LIMIT."""
    lost, of = sum(tally.lost for tally in tallies), sum(tally.of for tally in tallies)
    if lost > LOST_SHARE_LIMIT * of:
        why = next((tally.why for tally in tallies if tally.why), "no reason is known")
        raise kind(f"driver: {lost} of {of} {what}; {why}")


def _values(answers: Sequence[Answer]) -> dict[str, float]:
    return values(merged(answer.figures for answer in answers))


def _result(content: T, answers: Sequence[Answer]) -> DriverResult[T]:
    lost = {url: why for answer in answers for url, why in answer.lost.items()}
    return DriverResult(content, lost, tuple(note for answer in answers for note in answer.notes))


def encode_answer(answer: Answer) -> bytes:
    return msgspec.msgpack.encode(answer)


def request_decoder() -> Callable[[bytes], Request]:
    return msgspec.msgpack.Decoder(Request).decode
