"""Ten thousand inputs of strangers on the driver's live page and on its socket, each a process of its own."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil
import pytest
import zmq

from collab_megatron.rollout.listener import MAX_REQUEST_BYTES
from collab_megatron.rollout.live_page import MOST_CONNECTIONS
from collab_megatron.wire.curve import REFUSED, encrypt_client
from collab_megatron.wire.protocol import DriverClient, Request
from tests.conftest import REPOSITORY
from tests.fuzz import INPUTS, half_open, http_input, http_request, mutated, send_each, statuses, steady, zmq_input

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PATHS = ("/", "/status", "/metrics", "/nothing", "*", "http://example.com/")
TOKEN = "0123456789abcdef"
IDLE_S = 1.0
WAIT_S = 20.0


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)


@contextmanager
def program(folder: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *argv], cwd=REPOSITORY, stdout=log, stderr=log)
    try:
        yield process
        assert process.poll() in (None, 0), (folder / "log").read_text()[-2000:]
    finally:
        process.kill()
        process.wait(WAIT_S)


@contextmanager
def live_page(folder: Path, idle_s: float) -> Iterator[tuple[int, tuple[str, int], Callable[[], dict[str, int]]]]:
    """pid, address, and what asks the page, with its key, how many requests it has refused by reason."""
    with program(folder, "tests.rollout.lone_page", str(folder), str(idle_s)) as page:
        until((folder / "live.json").exists)
        live = json.loads((folder / "live.json").read_text())
        parts = urlsplit(live["url"])

        def refused() -> dict[str, int]:
            headers = {"Authorization": f"Bearer {live['key']}"}
            answer = httpx.get(f"{live['url']}/status", headers=headers, trust_env=False)
            assert answer.status_code == 200
            return dict(answer.json()["refused"])

        yield page.pid, (parts.hostname or "", parts.port or 0), refused


def test_live_page(tmp_path: Path) -> None:
    rng = random.Random(11)
    with live_page(tmp_path, IDLE_S) as (pid, where, refused):
        send_each(where, [http_input(rng, PATHS) for _ in range(1000)])
        with steady(pid, memory_mb=20):
            found = statuses(send_each(where, (http_input(rng, PATHS) for _ in range(INPUTS))))
            assert sum(found.values()) == INPUTS
            assert found[401] > INPUTS / 3
            assert found[400] > INPUTS / 10
            assert set(found) <= {0, 400, 401}, found
            assert refused()["without the key"] >= found[401]
            assert refused()["malformed"] > found[400] // 2  # aiohttp answers some without a word
            with half_open(where, MOST_CONNECTIONS, http_request(rng, PATHS, key=b"Bearer guessed")):
                time.sleep(2 * IDLE_S)  # those that say nothing whole are closed, and others are served again
                refused()
    assert (tmp_path / "log").stat().st_size < 100_000, "strangers must not fill the disk"


def test_live_page_holds_no_more_connections_than_its_limit(tmp_path: Path) -> None:
    """However fast they come: while the page is stopped they gather, and it accepts them all at once."""
    with live_page(tmp_path, idle_s=WAIT_S) as (pid, where, refused):
        files = psutil.Process(pid).num_fds()
        os.kill(pid, signal.SIGSTOP)
        with half_open(where, 90, b"GET / HTTP/1.1\r\n") as strangers:
            os.kill(pid, signal.SIGCONT)
            until(lambda: closed(strangers) == len(strangers) - MOST_CONNECTIONS)
            time.sleep(IDLE_S)
            assert closed(strangers) == len(strangers) - MOST_CONNECTIONS
            for stranger in strangers:
                stranger.close()
            until(lambda: psutil.Process(pid).num_fds() <= files)
            assert refused() == {"too many connections": len(strangers) - MOST_CONNECTIONS}


def closed(strangers: list[socket.socket]) -> int:
    """Number of connections that the other side has ended; nothing else arrives on them."""
    return len(select.select(strangers, [], [], 0)[0])


def driver_message(rng: random.Random) -> list[bytes]:
    """Frames of noise, and what is almost a request."""
    form = {"op": "step", "step": rng.choice((1, -1, 2**64 - 1)), "version": 1, "engines": ["http://a"], "saved": 0}
    packed = msgspec.msgpack.encode({**form, rng.choice(list(form)): rng.choice((None, [], {}, "x" * 2000, 1.5, b"y"))})
    deep = rng.choice((b"\x91", b"\x81\xa1a", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")) * 5000
    payload = rng.choice((packed, mutated(rng, packed), deep, rng.randbytes(200), b"\xc1", msgspec.json.encode(form)))
    if rng.random() < 0.5:
        return [b"", rng.choice((b"", b"guessed", TOKEN[:-1].encode(), TOKEN.encode() * 100)), payload]
    # with the token: they reach the decoder
    valid = msgspec.msgpack.encode(Request("stop"))
    return rng.choice(([b"", TOKEN.encode(), mutated(rng, payload) + b"\xc1"], [TOKEN.encode(), valid], [b""] * 40))


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_driver_socket(kind: str, tmp_path: Path) -> None:
    """Messages over ZeroMQ and, on TCP, raw connections; then a message without an end, whose frames must not be
    stored."""
    rng = random.Random(12)
    with ExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = f"ipc://{short}/driver" if kind == "ipc" else "tcp://127.0.0.1:*"
        driver = stack.enter_context(
            program(tmp_path, "tests.rollout.lone_listener", address, str(short / "ready"), TOKEN)
        )
        until((short / "ready").exists)
        address = (short / "ready").read_text()
        client = DriverClient([address], TOKEN.encode())
        stack.callback(client.close)

        def dropped() -> dict[str, int]:
            result = client.evaluate(0, 0, [], timeout_s=WAIT_S)
            return dict(json.loads(result.notes[0]))

        def knock(messages: int) -> None:
            before = sum(dropped().values())
            with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                stranger.linger = 0
                if kind == "tcp":
                    encrypt_client(stranger, TOKEN.encode(), "driver")
                stranger.connect(address)
                for _ in range(messages):
                    stranger.send_multipart(driver_message(rng))
                until(lambda: sum(dropped().values()) >= before + messages)

        knock(1000)
        parts = urlsplit(address)
        where = (parts.hostname or "", parts.port or 0)
        if kind == "tcp":
            send_each(where, [zmq_input(rng) for _ in range(1000)], waits=False)
        before = dropped()
        with steady(driver.pid, memory_mb=20):
            knock(INPUTS)
            if kind == "tcp":
                answers = send_each(where, (zmq_input(rng) for _ in range(INPUTS)), waits=False)
                assert len(answers) == INPUTS
                # ZeroMQ does not report those that hang up within the greeting
                until(lambda: dropped()[REFUSED] > before[REFUSED] + INPUTS // 2)
                endless(where)
                with half_open(where, 200, zmq_input(rng)):
                    dropped()  # it answers
        reasons = {"malformed", "unknown", "without the run's token"}
        assert set(dropped()) == (reasons | {REFUSED} if kind == "tcp" else reasons)
        client.stop()
        assert driver.wait(WAIT_S) == 0


def endless(where: tuple[str, int]) -> None:
    """A message of ever more frames from a peer that does not encrypt: 200 MB."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    frame = b"\x03" + (MAX_REQUEST_BYTES // 2).to_bytes(8, "big") + bytes(MAX_REQUEST_BYTES // 2)
    with half_open(where, 1, b"") as (stranger,), pytest.raises(ConnectionError):
        stranger.sendall(greeting + bytes([4, len(ready)]) + ready)
        for _ in range(400):
            stranger.sendall(frame)
