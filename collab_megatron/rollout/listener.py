"""The driver's end of the line to the trainer: only requests that carry the run's token get in.

A ZeroMQ ROUTER socket, on a Unix-domain socket in a folder of the run's own or, where the trainer is on another node,
on TCP. Whatever else arrives there (a stranger's raw connection that ZeroMQ takes for a message, another program's
request, one that does not decode) is counted and dropped: nothing is answered, and nothing ends. A REP socket would not
do, because it must answer a message before it can take the next one.
"""

from __future__ import annotations

import hmac
from collections import Counter
from typing import NamedTuple, cast

import msgspec
import zmq
import zmq.asyncio

from collab_megatron.errors import UserError
from collab_megatron.wire.protocol import Answer, Request, encode_answer, request_decoder

MAX_REQUEST_BYTES = 2**20
"""A request is a few URLs; ZeroMQ itself closes a connection that sends more."""


class Received(NamedTuple):
    """A request that got in, and whom to answer."""

    request: Request
    peer: bytes  # ZeroMQ's name of the connection


class Listener:
    """`next`, then `answer`, over and over; `close` at the end."""

    def __init__(self, context: zmq.asyncio.Context, address: str, token: bytes) -> None:
        """address: `ipc://FILE`, or `tcp://HOST:PORT`, where the port may be `*`. Raises UserError where it cannot be
        opened."""
        self._token = token
        self._decode = request_decoder()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.maxmsgsize = MAX_REQUEST_BYTES
        self.dropped: Counter[str] = Counter()  # messages, by what was wrong with them
        self._tell_at = 1
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise UserError(f"the driver cannot listen at {address}: {error.strerror}") from None
        self.address = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    async def next(self) -> Received:
        """Waits for a request that carries the token."""
        while True:
            frames = await self._socket.recv_multipart()
            received = self._admitted(frames)
            if received is not None:
                return received

    async def answer(self, received: Received, answer: Answer) -> None:
        """Drops the answer if the asking process is gone."""
        await self._socket.send_multipart([received.peer, b"", encode_answer(answer)])

    def news(self) -> str | None:
        """A sentence on the messages that were dropped, for the terminal: at the first one, and whenever there are ten
        times as many."""
        total = self.dropped.total()
        if total < self._tell_at:
            return None
        self._tell_at = 10 ** len(str(total))
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.dropped.items()))
        return f"driver: dropped {total} messages at {self.address} that are not of this run ({kinds})"

    def close(self) -> None:
        """Waits a second for the last answer to leave."""
        self._socket.close(linger=1000)

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
        except (msgspec.DecodeError, ValueError):  # a UnicodeDecodeError is the latter
            self.dropped["unknown"] += 1
            return None
