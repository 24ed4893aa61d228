"""Inputs of strangers for listeners: bytes for HTTP and ZeroMQ ports, sent over real connections, one input each.

All of it comes from a seed. What a listener must show afterwards: it serves who has the key, its memory and open files
have not grown, and it has counted what it refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil

INPUTS = 10_000
AT_ONCE = 48
ANSWER_S = 10.0  # for the answer to one input
MORE_S = 0.1  # then the sender ends its side
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "TRACE", "BREW", "get", "G\x00T", "A" * 300)
KEYS = (
    *(b"Bearer", b"Bearer ", b"Bearer guessed", b"Bearer " + b"k" * 4000, b"bearer \xff\xfe", b"Basic !!!"),
    *(
        b"Basic YTpi",
        b"Basic " + b"QQ==" * 900,
        b"Digest username=x",
        b"\xc3\xa9",
        b"Bearer x\tBearer y",
        b"Bearer \x7f",
    ),
)
OTHER_PROTOCOLS = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),  # TLS
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(40),
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03",  # ZeroMQ
    b"\x80\x02}q\x00.",  # a pickle
    b"*1\r\n$8\r\nFLUSHALL\r\n",
    b"\n" * 200,
)


def nested(rng: random.Random, depth: int = 4) -> Any:
    """A JSON value of any type."""
    kind = rng.randrange(9 if depth else 7)
    if kind == 7:
        return [nested(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(("model", "messages", "role", "n", "text", "\x00", "é")): nested(rng, depth - 1)}
    return (None, True, -(2**70), 1e308, "", "\ud800", "x" * rng.randrange(3000))[kind]


def json_body(rng: random.Random, form: dict[str, Any]) -> bytes:
    """`form`, with values of other types, or as text that is hardly JSON."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice((b"[" * 20_000, b'{"a":' * 20_000, b"\xff\xfe\x00{", b"nan", b"1" * 5000, b"", b'{"a":1}}'))
    if kind == 1:
        return json.dumps(nested(rng)).encode()
    changed = {name: nested(rng) if rng.random() < 0.4 else value for name, value in form.items()}
    return mutated(rng, json.dumps(changed).encode()) if kind == 2 else json.dumps(changed).encode()


def mutated(rng: random.Random, data: bytes) -> bytes:
    """With some bytes changed, left out or doubled."""
    found = bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        if not found:
            break
        at = rng.randrange(len(found))
        kind = rng.randrange(3)
        if kind == 0:
            found[at] = rng.randrange(256)
        elif kind == 1:
            del found[at : at + rng.randrange(1, 20)]
        else:
            found[at:at] = found[at : at + rng.randrange(1, 20)]
    return bytes(found)


def http_request(
    rng: random.Random, paths: Sequence[str], form: dict[str, Any] | None = None, key: bytes | None = None
) -> bytes:
    """A request without a key, with another one, or with `key`."""
    method = rng.choice(METHODS[:2]) if rng.random() < 0.8 else rng.choice(METHODS)
    path = (
        rng.choice(paths) if rng.random() < 0.8 else "/" + "../" * rng.randrange(30) + "x?" + "a" * rng.randrange(500)
    )
    given = key if key is not None else rng.choice((None, *KEYS))
    body = json_body(rng, form) if form is not None else rng.randbytes(rng.randrange(100))
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: localhost", b"Connection: close"]
    lines += [b"Authorization: " + given] if given is not None else []
    lines += [b"Content-Type: application/json", b"Content-Length: " + str(len(body)).encode()]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def http_input(
    rng: random.Random, paths: Sequence[str], form: dict[str, Any] | None = None, key: bytes | None = None
) -> bytes:
    """Noise, requests, and what is almost a request."""
    request = http_request(rng, paths, form, key)
    head = request[: request.index(b"\r\n\r\n")]
    kind = rng.randrange(12)
    if kind < 5:
        return request
    if kind < 7:
        return mutated(rng, request)
    if kind == 7:
        return request[: rng.randrange(len(request))]
    if kind == 8:
        return rng.choice((rng.randbytes(rng.randrange(1, 400)), *OTHER_PROTOCOLS))
    if kind == 9:  # lengths
        lengths = (b"1" + b"0" * 30, b"-1", b"0x10", b"5, 6", b"", b"\xb2")
        return (
            head.replace(b"Content-Length: ", b"Content-Length: " + rng.choice(lengths) + b"\r\nX: ") + b"\r\n\r\nbody"
        )
    if kind == 10:  # chunks
        size = rng.choice((b"f" * 16, b"-1", b"zz", b"5;" + b"x" * 5000, b"0"))
        return (
            head.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX") + b"\r\n\r\n" + size + b"\r\nhello\r\n"
        )
    more = rng.choice((b"X: " + b"y" * 20_000, b"\r\n".join([b"X: y"] * 500), b": x", b"X\x00: y", b"\tfolded"))
    return head + b"\r\n" + more + b"\r\n\r\n"


def zmq_input(rng: random.Random) -> bytes:
    """Greetings of ZeroMQ (RFC 23) for several mechanisms, whole and broken, and frames that follow them."""
    mechanism = rng.choice((b"NULL", b"CURVE", b"PLAIN", b"GSSAPI", b"", rng.randbytes(20)))
    greeting = b"\xff" + bytes(8) + b"\x7f\x03" + rng.choice((b"\0", b"\1")) + mechanism.ljust(20, b"\0")[:20]
    greeting += b"\0" + bytes(31)
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity" + rng.choice((bytes(4), b"\xff" * 4))
    commands = (
        bytes([4, len(ready)]) + ready,
        b"\x04\xc8" + (b"\x05HELLO\x01\x00" + rng.randbytes(192)).ljust(200, b"\0"),
        b"\x06" + (2**63 - 1).to_bytes(8, "big") + rng.randbytes(100),
        b"\x03" + (2**20).to_bytes(8, "big") + bytes(1000),
        b"\x01\x00" * rng.randrange(3000),
        rng.randbytes(rng.randrange(300)),
    )
    whole = greeting + b"".join(rng.choice(commands) for _ in range(rng.randrange(3)))
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice((rng.randbytes(rng.randrange(1, 400)), *OTHER_PROTOCOLS, b"GET / HTTP/1.1\r\n\r\n"))
    if kind == 1:
        return whole[: rng.randrange(1, len(whole))]
    return mutated(rng, whole) if kind == 2 else whole


async def _send(where: tuple[str, int], data: bytes, waits: bool) -> bytes:
    reader, writer = await asyncio.open_connection(*where)
    answer = b""
    try:
        async with asyncio.timeout(ANSWER_S):
            writer.write(data)
            try:
                async with asyncio.timeout(MORE_S):
                    answer = await reader.read(65536)
            except TimeoutError:  # it waits for the rest
                with contextlib.suppress(OSError):  # it has just closed
                    writer.write_eof()
            return answer + (await reader.read() if waits else b"")
    except ConnectionError:  # a refusal before all was sent
        return answer
    finally:
        writer.transport.abort()


def send_each(where: tuple[str, int], inputs: Iterable[bytes], *, waits: bool = True) -> list[bytes]:
    """The answer to each input, on a connection of its own, AT_ONCE at a time. `waits`: until the listener closes it;
    raises TimeoutError if it has not within ANSWER_S."""

    async def send_all() -> list[bytes]:
        left = iter(inputs)

        async def worker() -> list[bytes]:
            return [await _send(where, data, waits) for data in left]

        return [answer for answers in await asyncio.gather(*(worker() for _ in range(AT_ONCE))) for answer in answers]

    return asyncio.run(send_all())


def statuses(answers: Iterable[bytes]) -> dict[int, int]:
    """Number of answers by HTTP status; 0: none."""
    found: dict[int, int] = {}
    for answer in answers:
        status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0
        found[status] = found.get(status, 0) + 1
    return found


@contextlib.contextmanager
def half_open(where: tuple[str, int], number: int, begin: bytes) -> Iterator[list[socket.socket]]:
    """Connections that say the beginning of something and then nothing; they stay open."""
    with contextlib.ExitStack() as stack:
        found = []
        for count in range(number):
            one = stack.enter_context(socket.create_connection(where, timeout=ANSWER_S))
            with contextlib.suppress(ConnectionError):  # refused at once
                one.sendall(begin[: count % (len(begin) + 1)])
            found.append(one)
        yield found


@contextlib.contextmanager
def steady(pid: int, *, memory_mb: float, files: int = 8) -> Iterator[None]:
    """The process and its descendants hold no more memory and open files after the block than before."""
    before = _held(pid)
    yield
    deadline = time.monotonic() + ANSWER_S
    while (after := _held(pid))[1] > before[1] + files and time.monotonic() < deadline:
        time.sleep(0.1)  # connections that are being closed
    assert after[0] - before[0] < memory_mb * 2**20, f"{(after[0] - before[0]) / 2**20:.1f} MB more"
    assert after[1] <= before[1] + files, f"{before[1]} open files, then {after[1]}"


def _held(pid: int) -> tuple[int, int]:
    """Bytes of memory, open files."""
    main = psutil.Process(pid)
    family = [main, *main.children(recursive=True)]
    return sum(p.memory_info().rss for p in family), sum(p.num_fds() for p in family)
