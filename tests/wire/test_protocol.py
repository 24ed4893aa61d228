"""Trainer and driver over a real ZeroMQ socket: polling, errors, deadlines."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

import msgspec
import pytest
import zmq

from collab_megatron.errors import BudgetSpent, NoEngineLeft, RunError, SimulatorSick, TooManyErrors
from collab_megatron.figures import Figure
from collab_megatron.launch.ports import free_port
from collab_megatron.types import RolloutBatch, ShownTree, TrainingSample
from collab_megatron.wire import protocol
from collab_megatron.wire.curve import encrypt_server
from collab_megatron.wire.protocol import (
    Answer,
    DriverClient,
    DriverHasNoEngine,
    DriverResult,
    Request,
    Tally,
    encode_answer,
    request_decoder,
)

SAMPLE = TrainingSample((1, 2), (3, 4), (-0.5, -0.25), (6, 6), 1.5)
BATCH = RolloutBatch(step=7, samples=(SAMPLE,), metrics={"reward/mr_mean": 0.5})
TOKEN = b"secret"
DONE = Answer(samples=(SAMPLE,), figures={"reward/mr_mean": Figure.of("mean", [0.25, 0.75])})


def received(socket: zmq.Socket[bytes]) -> Request:
    token, payload = socket.recv_multipart()
    assert token == TOKEN
    return request_decoder()(payload)


@pytest.fixture
def served() -> Iterator[Callable[[list[Answer]], str]]:
    """Serve a list of answers, one per request, the last one over and over; the address to ask."""
    over = threading.Event()
    threads = []

    def serve(answers: list[Answer]) -> str:
        bound: queue.Queue[str] = queue.Queue()

        def run() -> None:
            with zmq.Context() as context, context.socket(zmq.REP) as socket:
                socket.linger = 0
                encrypt_server(socket, TOKEN, "driver")
                bound.put(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
                left = list(answers)
                while not over.is_set():
                    if left and socket.poll(50):
                        assert isinstance(received(socket), Request)
                        socket.send(encode_answer(left.pop(0) if len(left) > 1 else left[0]))
                    elif not left:
                        over.wait(0.05)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return bound.get(timeout=5)

    yield serve
    over.set()
    for thread in threads:
        thread.join(timeout=5)


def test_a_batch_arrives_as_it_was_sent_after_any_number_of_polls(served: Callable[[list[Answer]], str]) -> None:
    lost = {"http://a": "it was silent for 60 s"}
    answers = [
        Answer(pending=True),
        Answer(pending=True),
        Answer(samples=DONE.samples, figures=DONE.figures, lost=lost, notes=("hear",)),
    ]
    client = DriverClient([served(answers)], TOKEN)
    assert client.next_batch(7, 6, ["http://a", "http://b"], timeout_s=30) == DriverResult(BATCH, lost, ("hear",))
    client.close()


def test_every_poll_names_the_engines_that_may_be_asked() -> None:
    request = Request("step", 7, 6, ("http://a", "http://b"))
    assert request_decoder()(msgspec.msgpack.encode(request)) == request


def test_why_a_batch_was_refused_is_told_though_it_cannot_be_removed(
    served: Callable[[list[Answer]], str], caplog: pytest.LogCaptureFixture
) -> None:
    refused = Answer(tally=Tally(of=4, lost=3, why="the judge is away"))
    client = DriverClient([served([refused, Answer(error="driver: the disk is full")])], TOKEN)
    with pytest.raises(RunError, match="3 of 4 groups of step 8 were dropped; the judge is away"):
        client.next_batch(7, 6, [], timeout_s=30)
    assert "the refused batch of step 8 stays in the journal: driver: the disk is full" in caplog.text
    client.close()


@pytest.mark.parametrize("ask", ["next_batch", "evaluate"])
def test_a_driver_without_engines_can_be_told_from_one_that_failed(
    served: Callable[[list[Answer]], str], ask: str
) -> None:
    lost = {"http://a": "gone"}
    client = DriverClient([served([Answer(error="no engine is left", no_engine=True, lost=lost)])], TOKEN)
    with pytest.raises(DriverHasNoEngine, match="no engine is left") as caught:
        getattr(client, ask)(0, 0, ["http://a"], timeout_s=30)
    assert caught.value.lost == lost
    client.close()


def test_the_drivers_error_becomes_ours(served: Callable[[list[Answer]], str]) -> None:
    client = DriverClient([served([Answer(error="driver: all judges are gone")])], TOKEN)
    with pytest.raises(RunError, match="all judges are gone") as caught:
        client.next_batch(0, 0, [], timeout_s=30)
    assert not isinstance(caught.value, NoEngineLeft)
    client.close()


def test_a_deadline_names_what_was_waited_for(served: Callable[[list[Answer]], str]) -> None:
    client = DriverClient([served([Answer(pending=True)])], TOKEN)
    with pytest.raises(RunError, match="the rollouts of step 4"):
        client.next_batch(3, 3, [], timeout_s=0.0)
    client.close()


def test_a_silent_driver_is_noticed(monkeypatch: pytest.MonkeyPatch, served: Callable[[list[Answer]], str]) -> None:
    monkeypatch.setattr(protocol, "SILENT_S", 0.2)
    monkeypatch.setattr(protocol, "POLL_S", 0.1)
    client = DriverClient([served([])], TOKEN)
    with pytest.raises(RunError, match="has not answered for"):
        client.evaluate(0, 0, [], timeout_s=30)
    client.close()


@pytest.mark.slow
def test_where_the_handshake_fails_the_deadline_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeroMQ then takes the connection away, and a send without a connection would wait forever."""
    monkeypatch.setattr(protocol, "SILENT_S", 2.0)
    monkeypatch.setattr(protocol, "POLL_S", 0.1)
    monkeypatch.setattr(protocol, "ASK_AGAIN_S", 0.3)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:  # does not encrypt
        other.linger = 0
        port = other.bind_to_random_port("tcp://127.0.0.1")
        client = DriverClient([f"tcp://127.0.0.1:{port}"], TOKEN)
        time.sleep(0.5)  # the handshake has failed
        with pytest.raises(RunError, match=r"has not answered for 2 s"):
            client.next_batch(0, 0, [], timeout_s=20)
        client.close()


def test_shards_become_one_stream(served: Callable[[list[Answer]], str]) -> None:
    trees = tuple(ShownTree(float(mr), f"tree {mr}") for mr in range(6))
    other = Answer(samples=DONE.samples, figures={"reward/mr_mean": Figure.of("mean", [1.0])}, shown=trees[5:2:-1])
    first = msgspec.structs.replace(DONE, shown=trees[2::-1])
    client = DriverClient([served([Answer(pending=True), first]), served([other])], TOKEN)
    batch = client.next_batch(7, 6, [], timeout_s=30).content
    assert batch.samples == (SAMPLE, SAMPLE)
    assert batch.metrics == {"reward/mr_mean": pytest.approx(2 / 3)}
    assert batch.shown == (trees[5], trees[3], trees[0])  # best, median and worst of both
    client.close()


def test_the_limit_on_lost_work_is_that_of_all_shards(served: Callable[[list[Answer]], str]) -> None:
    """As many shards as prompts: one dropped group of four does not end the run, three do, and are made again."""
    kept, dropped = Answer(tally=Tally(1, 0)), Answer(tally=Tally(1, 1, "the engine refused"))
    client = DriverClient([served([kept, kept]), *(served([answer]) for answer in (dropped, kept, kept))], TOKEN)
    assert client.next_batch(2, 2, [], timeout_s=30).content.samples == ()
    assert client.evaluate(2, 2, [], timeout_s=30).content == {}
    client.close()
    client = DriverClient([served([answer, Answer(), answer]) for answer in (dropped, dropped, kept, dropped)], TOKEN)
    with pytest.raises(RunError, match="3 of 4 groups of step 3 were dropped; the engine refused"):
        client.next_batch(2, 2, [], timeout_s=30)
    with pytest.raises(RunError, match="3 of 4 held-out conversations failed; the engine refused"):
        client.evaluate(2, 2, [], timeout_s=30)
    client.close()


def test_a_batch_without_samples_is_explained(served: Callable[[list[Answer]], str]) -> None:
    client = DriverClient([served([Answer(notes=("hear",))]), served([Answer()])], TOKEN)
    notes = client.next_batch(7, 7, [], timeout_s=30).notes
    assert notes[0] == "hear"
    assert "step 8: the advantages of all groups are 0" in notes[1]
    client.close()


@pytest.mark.parametrize(
    ("stop", "kind"), [("budget", BudgetSpent), ("health", SimulatorSick), ("errors", TooManyErrors)]
)
def test_a_run_that_must_stop_is_told_why(
    served: Callable[[list[Answer]], str], stop: Literal["budget", "health", "errors"], kind: type[RunError]
) -> None:
    client = DriverClient([served([Answer(error="no more", stop=stop)])], TOKEN)
    with pytest.raises(kind, match="no more"):
        client.next_batch(0, 0, [], timeout_s=30)
    client.close()


def test_half_a_surrogate_pair_of_a_provider_can_be_sent(served: Callable[[list[Answer]], str]) -> None:
    lost = {"http://a": "half \ud800"}
    client = DriverClient(
        [served([Answer(notes=("half \ud83d", "\ud83d\ude00"), lost=lost, tally=Tally(1, 0, "\udfff"))])], TOKEN
    )
    result = client.next_batch(7, 6, [], timeout_s=30)
    assert result.notes[:2] == ("half \ufffd", "\U0001f600")
    assert result.lost == {"http://a": "half \ufffd"}
    client.close()


def test_after_an_error_of_one_shard_all_are_asked_anew(served: Callable[[list[Answer]], str]) -> None:
    """The other one still owes the answer to the first request."""
    slow = served([Answer(pending=True), Answer(pending=True), DONE])
    client = DriverClient([slow, served([Answer(error="no engine is left", no_engine=True), DONE])], TOKEN)
    with pytest.raises(DriverHasNoEngine):
        client.next_batch(7, 6, [], timeout_s=30)
    assert len(client.next_batch(7, 6, [], timeout_s=30).content.samples) == 2
    client.close()


def test_a_driver_that_was_started_again_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "POLL_S", 0.1)
    monkeypatch.setattr(protocol, "ASK_AGAIN_S", 0.3)
    port = free_port()
    got: list[Request] = []

    def life(answer: Answer | None) -> None:
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            encrypt_server(socket, TOKEN, "driver")
            socket.bind(f"tcp://127.0.0.1:{port}")
            got.append(received(socket))
            if answer is not None:
                socket.send(encode_answer(answer))
            else:
                socket.linger = 0  # killed with the request in hand

    def lives() -> None:
        life(None)
        life(DONE)

    thread = threading.Thread(target=lives, daemon=True)
    thread.start()
    client = DriverClient([f"tcp://127.0.0.1:{port}"], TOKEN)
    assert client.next_batch(7, 6, [], timeout_s=30).content == BATCH
    thread.join(timeout=5)
    assert got[0] == got[1]
    client.close()
