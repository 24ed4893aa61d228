"""Strangers at the driver's address: nothing that they send gets in, ends anything or keeps the trainer waiting."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq
import zmq.asyncio

from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout.listener import MAX_REQUEST_BYTES, Listener
from collab_megatron.wire import protocol
from collab_megatron.wire.curve import REFUSED, encrypt_client
from collab_megatron.wire.protocol import Answer, DriverClient, Request
from tests.engine.fake_servers import FakeServer
from tests.rollout.test_service import service, until

TOKEN = b"0123456789abcdef"
MESSAGES = 10_000
Kind = Literal["tcp", "ipc"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a name short enough for a socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def address(kind: Kind, folder: Path) -> str:
    return "tcp://127.0.0.1:*" if kind == "tcp" else f"ipc://{folder / 'driver'}"


def random_message(rng: random.Random) -> list[bytes]:
    """Frames of noise, of requests without the token, and of the token with noise."""
    frames = [rng.randbytes(rng.randrange(60)) for _ in range(rng.randrange(1, 5))]
    stop = msgspec.msgpack.encode(Request("stop"))
    return rng.choice(
        [
            frames,
            [b"", *frames],
            [b"", stop],
            [b"", TOKEN[:-1], stop],
            [b"", b"", stop],
            [b"", stop, TOKEN],
            [b"", TOKEN, *frames],
            [b"", TOKEN, msgspec.msgpack.encode({"op": "shutdown"})],
            [b"", TOKEN, stop, b""],
        ]
    )


def knock(strangers: Sequence[zmq.Socket[bytes]], where: str, seed: int) -> None:
    rng = random.Random(seed)
    for stranger in strangers:
        stranger.linger = 0
        if where.startswith("tcp"):
            encrypt_client(stranger, TOKEN, "driver")  # else nothing of it arrives
        stranger.connect(where)
    for number in range(MESSAGES):
        strangers[number % len(strangers)].send_multipart(random_message(rng))


def connect_raw(where: str, seed: int) -> list[socket.socket]:
    """Connections that speak no ZeroMQ: silent ones, noise, and messages of ZeroMQ's first version, which had no
    greeting. They stay open."""
    rng = random.Random(seed)
    sockets = []
    for number in range(50):
        if where.startswith("tcp"):
            parts = urlsplit(where)
            raw = socket.create_connection((parts.hostname, parts.port), timeout=10)
        else:
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(where.removeprefix("ipc://"))
        noise = [b"", rng.randbytes(300), b"\x01\x00\x01\x01\x06\x00hello", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64]
        raw.sendall(noise[number % 5])
        sockets.append(raw)
    return sockets


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
async def test_ten_thousand_random_messages_have_no_effect_on_the_service(
    kind: Kind, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "POLL_S", 0.2)
    server = FakeServer(version="0")
    context = zmq.asyncio.Context()
    listener = Listener(context, address(kind, folder), TOKEN)
    news = []
    async with service(tmp_path, server) as driver:

        async def serve() -> None:
            while True:
                asked = await listener.next()
                answer = await driver.answer(asked.request)
                news.append(listener.news())
                await listener.answer(asked, answer)
                if asked.request.op == "stop":
                    return

        serving = asyncio.create_task(serve())
        raw = await asyncio.to_thread(connect_raw, listener.address, 1)
        with zmq.Context() as other, contextlib.ExitStack() as stack:
            # open until all is counted: of a connection that was closed ZeroMQ drops what it has not read yet
            strangers = [stack.enter_context(other.socket(zmq.DEALER)) for _ in range(4)]
            await asyncio.to_thread(knock, strangers, listener.address, 2)
            client = DriverClient([listener.address], TOKEN)
            batch = await asyncio.to_thread(lambda: client.next_batch(0, 0, [server.url], timeout_s=60).content)
            assert len(batch.samples) == 4
            await until(lambda: listener.dropped.total() >= MESSAGES)
        stranger = DriverClient([listener.address], b"guessed")
        with pytest.raises(RunError, match="waited over"):  # nobody answers it
            await asyncio.to_thread(lambda: stranger._ask_all(Request("stop"), "no", 0.0))
        stranger.close()
        assert not serving.done()
        await asyncio.to_thread(client.stop)
        await asyncio.wait_for(serving, timeout=10)
        client.close()
    for one in raw:
        one.close()
    inside = {"malformed", "unknown", "without the run's token"}
    assert set(listener.dropped) == (inside | {REFUSED} if kind == "tcp" else inside)
    told = [one for one in news if one is not None]
    assert 1 <= len(told) <= 5  # a sentence for ten times as many, not one each
    assert "that are not from this run" in told[0]
    listener.close()
    context.term()


async def test_a_message_beyond_all_bounds_is_not_read(folder: Path) -> None:
    context = zmq.asyncio.Context()
    listener = Listener(context, address("ipc", folder), TOKEN)
    with zmq.Context() as other, other.socket(zmq.DEALER) as stranger, other.socket(zmq.DEALER) as trainer:
        stranger.linger = 0
        for end in (stranger, trainer):
            end.connect(listener.address)
        request = msgspec.msgpack.encode(Request("step", 3))
        stranger.send_multipart([b"", TOKEN, request + b" " * MAX_REQUEST_BYTES])
        trainer.send_multipart([b"", TOKEN, request])
        asked = await asyncio.wait_for(listener.next(), timeout=10)
        assert asked.request == Request("step", 3)
        await listener.answer(asked, Answer(error="no"))
        assert trainer.poll(10_000)
    assert not listener.dropped
    listener.close()
    context.term()


async def test_an_address_that_cannot_be_opened_is_one_sentence(tmp_path: Path) -> None:
    context = zmq.asyncio.Context()
    for where in (f"ipc://{tmp_path}/none/driver", f"ipc://{tmp_path}/{'x' * 120}", "tcp://256.0.0.1:1", "nonsense"):
        with pytest.raises(UserError, match="the driver cannot listen at"):
            Listener(context, where, TOKEN)
    context.destroy()
