"""Protocol of trainer and driver: msgpack over ZeroMQ, one socket per shard (the driver's end: rollout/listener.py).

Every request carries the run's token, from a file that only this user can read. Requests without it get no answer. On
TCP both ways are encrypted (curve.py).

The driver answers within POLL_S: with the result, or with "pending", and then the trainer sends the request again. So
the trainer notices a dead driver, and a deadline can report what was waited for. A restarted driver listens at the same
address; the same request may be sent any number of times.
"""

from __future__ import annotations

import contextlib
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
from collab_megatron.figures import Figure, best_median_worst, merged, values
from collab_megatron.text import whole_text
from collab_megatron.types import RolloutBatch, ShownTree, TrainingSample
from collab_megatron.wire.curve import encrypt_client

POLL_S = 2.0
"""After this time the driver answers "pending"."""
ASK_AGAIN_S = 15.0
"""After this silence the request counts as lost and is sent again. Far above POLL_S: the driver's loop may be busy."""
SILENT_S = 120.0
"""Deadline for a driver that does not answer; it may be restarting."""
WHY_STOP = {"budget": BudgetSpent, "health": SimulatorSick, "errors": TooManyErrors}
LOST_CONVERSATIONS = "held-out conversations failed"
LOST_SHARE_LIMIT = 0.5
"""A step or evaluation fails if it lost more than this share of its groups or conversations, over all shards."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Request(msgspec.Struct):
    """A request of trainer rank 0.

    Example: Request("step", step=7, version=7, engines=("http://node-1:30000",), saved=4)
    """

    op: Literal["step", "evaluate", "discard", "stop"]  # discard: the trainer refused the batch of `step`
    step: int = 0  # optimizer steps done, from 0; messages for users count from 1
    version: int | None = 0  # live weight version of the engines; None: they keep the weights that they have
    engines: tuple[str, ...] = ()  # URLs of the servers with these weights; the driver uses no others
    saved: int = 0  # step of the newest complete checkpoint


class Tally(msgspec.Struct, frozen=True):
    """Lost groups or conversations of one shard."""

    of: int = 0  # groups of a step, conversations of an evaluation
    lost: int = 0  # dropped groups, failed conversations
    why: str = ""  # the error of one of them

    def __post_init__(self) -> None:
        structs.force_setattr(self, "why", whole_text(self.why))  # may quote a provider


class Answer(msgspec.Struct):
    """An answer of the driver: pending, an error, or figures and, for a step, samples."""

    pending: bool = False
    samples: tuple[TrainingSample, ...] = ()
    figures: dict[str, Figure] = {}
    error: str = ""
    no_engine: bool = (
        False  # the error is that no engine is left: the trainer may send the request again, with other engines
    )
    stop: Literal["", "budget", "health", "errors"] = ""  # the error ends the run
    notes: tuple[str, ...] = ()  # for the terminal
    lost: dict[str, str] = {}  # engines lost during this request: URL -> reason
    tally: Tally = Tally()
    shown: tuple[ShownTree, ...] = ()  # of a step: best, median and worst tree of this shard

    def __post_init__(self) -> None:
        """Replace lone surrogates in texts of providers and LLMs: msgpack cannot encode them."""
        self.error, self.notes = whole_text(self.error), tuple(map(whole_text, self.notes))
        self.lost = {url: whole_text(why) for url, why in self.lost.items()}


@dataclass(frozen=True)
class DriverResult(Generic[T]):
    """The merged result of all shards, notes for the user, and the engines lost on the way."""

    content: T
    lost: dict[str, str]  # URL -> reason
    notes: tuple[str, ...] = ()


class DriverHasNoEngine(NoEngineLeft):
    """The driver lost every engine. The request may be sent again with other engines."""

    def __init__(self, message: str, lost: dict[str, str]) -> None:
        super().__init__(message)
        self.lost = lost  # URL -> reason


class DriverClient:
    """The trainer's end: sends a request to every shard and merges the answers. Not thread-safe."""

    def __init__(self, addresses: Sequence[str], token: bytes, tick: Callable[[], None] = lambda: None) -> None:
        """tick: called while it waits, at least every POLL_S; what it raises ends the wait."""
        self._context, self._tick = zmq.Context(), tick
        self._lines = [_Line(self._context, address, token) for address in addresses]

    def close(self) -> None:
        for line in self._lines:
            line.close()
        self._context.term()

    def next_batch(
        self, step: int, version: int | None, engines: Sequence[str], *, saved: int = 0, timeout_s: float
    ) -> DriverResult[RolloutBatch]:
        """The batch of `step`, sampled by `engines`, which all have weights `version` (None: nobody trains). Waits at
        most `timeout_s`.

        Raises RunError at the deadline, for an error of the driver, or if the shards dropped more than half of the
        groups; DriverHasNoEngine if all engines are lost; BudgetSpent, SimulatorSick or TooManyErrors if the run must
        stop.
        """
        request = Request("step", step, version, tuple(engines), saved)
        answers = self._ask_all(request, f"the rollouts of step {step + 1}", timeout_s)
        try:
            require_most([answer.tally for answer in answers], f"groups of step {step + 1} were dropped")
        except RunError:
            self._discard(step)
            raise
        samples = tuple(sample for answer in answers for sample in answer.samples)
        shown = best_median_worst([tree for answer in answers for tree in answer.shown], lambda tree: tree.mr)
        result = _result(RolloutBatch(step, samples, _values(answers), shown), answers)
        if samples:
            return result
        note = (
            f"step {step + 1}: the advantages of all groups are 0 and algorithm.zero_advantage is drop, or no group "
            "has a pair for online_dpo, so there is no optimizer step"
        )
        return replace(result, notes=(*result.notes, note))

    def _discard(self, step: int) -> None:
        """Remove the refused batch of `step` from the journal, from which every resume would get it again. Only logs a
        failure: the caller raises the reason of the refusal."""
        try:
            self._ask_all(Request("discard", step), f"the removal of the refused batch of step {step + 1}", SILENT_S)
        except RunError as failure:
            logger.warning("the refused batch of step %d stays in the journal: %s", step + 1, failure)

    def evaluate(
        self, step: int, version: int, engines: Sequence[str], *, timeout_s: float
    ) -> DriverResult[dict[str, float]]:
        """Held-out figures of the live weights. Waits at most `timeout_s`. Raises as `next_batch`, with
        EvaluationFailed if more than half of the conversations failed."""
        request = Request("evaluate", step, version, tuple(engines))
        answers = self._ask_all(request, f"the evaluation after step {step}", timeout_s)
        require_most([answer.tally for answer in answers], LOST_CONVERSATIONS, EvaluationFailed)
        return _result(_values(answers), answers)

    def stop(self) -> None:
        """Stop all shards. Waits for their answers, at most SILENT_S."""
        self._ask_all(Request("stop"), "the end of the driver", SILENT_S)

    def _ask_all(self, request: Request, what: str, timeout_s: float) -> list[Answer]:
        """Every shard's final answer. Waits at most `timeout_s`. Raises the first error among the answers."""
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
            self._tick()
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
                raise RunError(f"trainer rank 0 waited over {timeout_s:g} s for {what}: see the driver's log")
        return [answers[line] for line in self._lines]


class _Line:
    """The connection to one shard."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, token: bytes) -> None:
        self._context, self._address, self._token = context, address, token
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._asked = self._heard = time.monotonic()
        self._owed = False  # an answer is expected
        self._connect()

    def _connect(self) -> None:
        self.socket = self._context.socket(zmq.REQ)
        self.socket.linger = 0  # a client that was never closed must not block the end of the process
        if self._address.startswith("tcp:"):
            encrypt_client(self.socket, self._token, "driver")
        self.socket.connect(self._address)

    def ask(self, payload: bytes) -> None:
        if self._owed:  # another shard's error ended the earlier request
            self.forget()
        # without a connection, as after a failed handshake, the request is lost, and asked again after ASK_AGAIN_S
        with contextlib.suppress(zmq.Again):
            self.socket.send_multipart([self._token, payload], zmq.NOBLOCK)
        self._owed = True
        self._asked = self._heard = time.monotonic()

    def take(self) -> Answer:
        self._owed = False
        self._heard = time.monotonic()
        return self._decoder.decode(self.socket.recv())

    def ask_again_after_silence(self, payload: bytes, what: str) -> None:
        """Send a lost request again. Raises RunError after SILENT_S of silence."""
        now, heard = time.monotonic(), self._heard
        if now - heard > SILENT_S:
            raise RunError(
                f"trainer rank 0: driver {self._address} has not answered for {SILENT_S:g} s; waiting for "
                f"{what}: see the driver's log"
            )
        if now - self._asked > ASK_AGAIN_S:
            self.ask(payload)
            self._heard = heard

    def forget(self) -> None:
        """Drop the expected answer with its socket: a REQ socket cannot send before it has received."""
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
    """Raises `kind` with "5 of 8 `what`" if all shards together lost more than LOST_SHARE_LIMIT."""
    lost, of = sum(tally.lost for tally in tallies), sum(tally.of for tally in tallies)
    if lost > LOST_SHARE_LIMIT * of:
        why = next((tally.why for tally in tallies if tally.why), "the reason is unknown")
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
