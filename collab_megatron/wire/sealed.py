"""Sealed messages of launcher and node agents: nobody without the job's key can write, change or repeat one. Pure.

    frames   [session, 16 bytes] [counter, 8 bytes] [tag, 32 bytes] [body]
    tag      HMAC-SHA256(key, sender | session | counter | body)

A session is 8 random bytes of the agent and 8 of the launcher; in the agent's first message those of the launcher are
zero. Each side counts its messages, and takes none whose number is not above the last one. Encryption is curve.py's.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from typing import Literal

from collab_megatron.errors import UserError

KEY_BYTES = 32
HALF = 8  # bytes of a session that each side chooses
NOBODY = bytes(HALF)
COUNTER_BYTES = 8
TAG_BYTES = 32
MAX_BODY = 2**20

Side = Literal["agent", "launcher"]


class Refused(Exception):
    """A message that is dropped; the text is the reason, in a few words."""


class Channel:
    """One side's end of a session."""

    def __init__(self, key: bytes, session: bytes, side: Side) -> None:
        assert len(key) == KEY_BYTES, "from read_key"
        assert len(session) == 2 * HALF
        self._key, self.session, self._side = key, session, side.encode()
        self._other = b"launcher" if side == "agent" else b"agent"
        self._sent = self._taken = 0

    def seal(self, body: bytes) -> list[bytes]:
        """The frames of a message."""
        assert len(body) <= MAX_BODY, len(body)
        self._sent += 1
        counter = self._sent.to_bytes(COUNTER_BYTES, "big")
        return [self.session, counter, self._tag(self._side, counter, body), body]

    def open(self, frames: Sequence[bytes]) -> bytes:
        """The body of a message of the other side. Raises Refused, and then nothing has changed."""
        session, counter, tag, body = parts_of(frames)
        if session != self.session:
            raise Refused("of another session")
        if not hmac.compare_digest(tag, self._tag(self._other, counter, body)):
            raise Refused("without the job's key")
        number = int.from_bytes(counter, "big")
        if number <= self._taken:
            raise Refused("repeated")
        self._taken = number
        return body

    def _tag(self, sender: bytes, counter: bytes, body: bytes) -> bytes:
        return hmac.digest(self._key, b"|".join([sender, self.session, counter, body]), "sha256")


def parts_of(frames: Sequence[bytes]) -> tuple[bytes, bytes, bytes, bytes]:
    """Session, counter, tag, body. Raises Refused for frames of other lengths."""
    if len(frames) != 4:
        raise Refused("malformed")
    session, counter, tag, body = frames
    if (len(session), len(counter), len(tag)) != (2 * HALF, COUNTER_BYTES, TAG_BYTES) or len(body) > MAX_BODY:
        raise Refused("malformed")
    return session, counter, tag, body


def new_half() -> bytes:
    """One side's random part of a session."""
    return secrets.token_bytes(HALF)


def read_key(text: str, where: str) -> bytes:
    """The job's key from its hexadecimal digits. where: for the error message. Raises UserError, which never has it."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(f"{where} has no key of {2 * KEY_BYTES} hexadecimal digits: start the job again")
    return key
