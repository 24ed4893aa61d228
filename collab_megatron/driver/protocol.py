"""What trainer and driver say to each other: msgpack over a ZeroMQ REQ/REP socket on this node.

A request for work is asked again every POLL_S until it is done, so that neither side ever waits in silence: the trainer
notices a dead driver within seconds, and a deadline names what was being waited for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec
import zmq

from collab_megatron.errors import NoEngineLeft, RunError
from collab_megatron.types import RolloutBatch

POLL_S = 2.0
"""How long the driver holds a request before it answers "not yet"."""
ANSWER_TIMEOUT_S = 60.0
"""How long the trainer waits for any answer: far above POLL_S, since the driver's loop may be busy."""

T = TypeVar("T")


class Request(msgspec.Struct):
    """Asked by the trainer's rank 0."""

    op: Literal["step", "evaluate", "stop"]
    step: int = 0  # training step, counted from 0
    version: int = 0  # weight version that is live in the engines
    engines: tuple[str, ...] = ()  # URLs of the servers that hold it; no others may be asked


class Answer(msgspec.Struct):
    """Given by the driver; exactly one of pending, batch, metrics and error is set."""

    pending: bool = False
    batch: RolloutBatch | None = None
    metrics: dict[str, float] | None = None
    error: str = ""
    no_engine: bool = False  # the error is that no engine is left: the same may be asked again, with others
    lost: dict[str, str] = {}  # engines that were given up while this was worked on: URL -> reason


@dataclass(frozen=True)
class Delivery(Generic[T]):
    """What was asked for, and the engines that were given up on the way."""

    content: T
    lost: dict[str, str]  # URL -> reason


class DriverHasNoEngine(NoEngineLeft):
    """The driver gave every engine up; the same step may be asked for again, with others."""

    def __init__(self, message: str, lost: dict[str, str]) -> None:
        super().__init__(message)
        self.lost = lost  # URL -> reason


class DriverClient:
    """The trainer's end. Not for threads."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0  # a client that is dropped unclosed must not keep the process from ending
        self._socket.connect(address)
        self._address = address
        self._decoder = msgspec.msgpack.Decoder(Answer)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def next_batch(
        self, step: int, version: int, engines: Sequence[str], *, timeout_s: float
    ) -> Delivery[RolloutBatch]:
        """The finished groups of `step`, sampled by `engines`, all of which hold `version`.

        Raises RunError at the deadline or with the driver's own error; DriverHasNoEngine when all were given up.
        """
        request = Request("step", step, version, tuple(engines))
        answer = self._wait(request, f"the rollouts of step {step}", timeout_s)
        if answer.batch is None:
            raise RunError(f"driver {self._address} answered step {step} without a batch")
        return Delivery(answer.batch, answer.lost)

    def evaluate(
        self, step: int, version: int, engines: Sequence[str], *, timeout_s: float
    ) -> Delivery[dict[str, float]]:
        """Held-out figures under the live weights. Raises as `next_batch` does."""
        request = Request("evaluate", step, version, tuple(engines))
        answer = self._wait(request, f"the evaluation at step {step}", timeout_s)
        return Delivery(answer.metrics or {}, answer.lost)

    def stop(self) -> None:
        """Ask the driver to end; it answers before it does."""
        self._wait(Request("stop"), "the driver's end", ANSWER_TIMEOUT_S)

    def _wait(self, request: Request, what: str, timeout_s: float) -> Answer:
        payload = msgspec.msgpack.encode(request)
        start = time.monotonic()
        while True:
            self._socket.send(payload)
            if not self._socket.poll(int(ANSWER_TIMEOUT_S * 1000)):
                raise RunError(f"trainer rank 0: driver {self._address} is silent while waiting for {what}")
            answer = self._decoder.decode(self._socket.recv())
            if answer.no_engine:
                raise DriverHasNoEngine(answer.error, answer.lost)
            if answer.error:
                raise RunError(answer.error)
            if not answer.pending:
                return answer
            if time.monotonic() - start > timeout_s:
                raise RunError(f"trainer rank 0 waited over {timeout_s:g} s for {what}")


def encode_answer(answer: Answer) -> bytes:
    return msgspec.msgpack.encode(answer)


def request_decoder() -> Callable[[bytes], Request]:
    return msgspec.msgpack.Decoder(Request).decode
