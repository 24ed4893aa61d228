"""Listener: the driver's end of the connection to the trainer. It admits only requests with the run's token.

A ZeroMQ ROUTER socket, on a Unix-domain socket in a folder of the run or, with a trainer on another node, on TCP, where
it is encrypted. Every
other message (bytes of a port scan, a request of another program, a request that does not decode) is counted and
dropped without an answer. A REP socket could not do this: it must answer a message before it can receive the next one.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import NamedTuple, cast

import msgspec
import zmq
import zmq.asyncio

from collab_megatron.errors import UserError
from collab_megatron.wire.curve import REFUSED, encrypt_server, watch_refusals
from collab_megatron.wire.dropped import Dropped
from collab_megatron.wire.protocol import Answer, Request, encode_answer, request_decoder

MAX_REQUEST_BYTES = 2**20
"""A request holds a few URLs. ZeroMQ closes a connection that sends more."""


class Received(NamedTuple):
    """An admitted request and its sender."""

    request: Request
    peer: bytes  # ZeroMQ's identity of the connection


class Listener:
    """Call `next`, then `answer`, repeatedly; `close` at the end."""

    def __init__(self, context: zmq.asyncio.Context, address: str, token: bytes) -> None:
        """address: `ipc://FILE`, or `tcp://HOST:PORT`, where the port may be `*`. Raises UserError if it cannot be
        opened."""
        self._token = token
        self._decode = request_decoder()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = MAX_REQUEST_BYTES
        self.dropped = Dropped()
        if address.startswith("tcp:"):
            encrypt_server(self._socket, token, "driver")
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise UserError(
                f"the driver cannot listen at {address}: {error.strerror}; free the address, or start the run again"
            ) from None
        tcp = address.startswith("tcp:")
        self._refusals = cast(zmq.asyncio.Socket, watch_refusals(self._socket)) if tcp else None
        self._counting: asyncio.Task[None] | None = None
        self.address = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    async def next(self) -> Received:
        """The next request with the token. Unblocked by a message of the trainer; no deadline: it may pause."""
        if self._refusals is not None and self._counting is None:
            self._counting = asyncio.create_task(self._count(self._refusals))
        while True:
            frames = await self._socket.recv_multipart()
            received = self._admitted(frames)
            if received is not None:
                return received

    async def answer(self, received: Received, answer: Answer) -> None:
        """Send the answer; it is dropped if the trainer is gone."""
        await self._socket.send_multipart([received.peer, b"", encode_answer(answer)])

    def news(self) -> str | None:
        """A sentence about dropped messages for the terminal, now and then."""
        return self.dropped.news("driver", self.address)

    def close(self) -> None:
        """Close the socket. Waits at most a second until the last answer is sent."""
        if self._counting is not None:
            self._counting.cancel()
        self._socket.close(linger=1000)
        if self._refusals is not None:
            self._refusals.close()

    async def _count(self, refusals: zmq.asyncio.Socket) -> None:
        """Ends with the listener."""
        while True:
            await refusals.recv_multipart()
            self.dropped[REFUSED] += 1

    def _admitted(self, frames: list[bytes]) -> Received | None:
        if len(frames) != 4 or frames[1]:
            self.dropped["malformed"] += 1
            return None
        peer, _, token, payload = frames
        if not hmac.compare_digest(token, self._token):
            self.dropped["without the run's token"] += 1
            return None
        try:
            return Received(self._decode(payload), peer)
        except (msgspec.DecodeError, ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
            self.dropped["unknown"] += 1
            return None
