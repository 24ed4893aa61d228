"""The rollout client on two ranks, with a driver that loses engines."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import zmq

from collab_megatron.figures import of_kind
from collab_megatron.wire.curve import encrypt_server
from collab_megatron.wire.protocol import Answer, Request, encode_answer, request_decoder
from tests.trainer.parallel.ranks import run_ranks

ANSWERS = [
    Answer(figures=of_kind("sum", {"x": 1.0}), lost={"http://a": "silent"}),
    Answer(error="no engine is left", no_engine=True, lost={"http://b": "gone"}),
    Answer(figures=of_kind("sum", {"y": 2.0})),
    Answer(),  # to the request to stop
]


@pytest.mark.slow
def test_every_rank_hears_of_a_batch_and_of_no_engine_being_left() -> None:
    context = zmq.Context()
    socket = context.socket(zmq.REP)
    encrypt_server(socket, b"secret", "driver")
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    asked: list[Request] = []

    def serve() -> None:
        for answer in ANSWERS:
            token, payload = socket.recv_multipart()
            assert token == b"secret"
            asked.append(request_decoder()(payload))
            socket.send(encode_answer(answer))
        socket.close(linger=1000)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    script = Path(__file__).with_name("rollout_client_ranks.py")
    main, other = (text.splitlines() for text in run_ranks(script, 2, f"tcp://127.0.0.1:{port}", deadline_s=120))
    thread.join(timeout=5)
    context.destroy(linger=0)
    assert main[-3:] == [
        "{'x': 1.0} {'http://a': 'silent'} {}",
        "no engine is left {'http://b': 'gone'}",
        "{'y': 2.0} {}",
    ]
    assert other[-3:] == ["{'x': 1.0} {} {}", "no engine is left {}", "{'y': 2.0} {}"]
    assert [(request.op, request.step, request.engines) for request in asked] == [
        ("step", 0, ("http://a", "http://b")),
        ("step", 1, ("http://a", "http://b")),
        ("evaluate", 1, ("http://a", "http://b")),
        ("stop", 0, ()),
    ]
