"""Encryption of messages that cross the network: ZeroMQ's CURVE, with keys that both ends derive from their secret.

The server's key pair follows from the secret, so a client that knows the secret knows the server's public key, and
nobody else can finish the handshake. Clients have keys of the moment; that they know the secret they show inside (the
run's token, the seal of sealed.py).

It also bounds memory: without it ZeroMQ stores the frames of a message that never ends, of anybody who connects.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import zmq
from zmq.utils import z85

from collab_megatron.errors import UserError

REFUSED = "without the run's handshake"
"""Reason of a refusal, for Dropped."""
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


def encrypt_server(socket: zmq.Socket[Any] | Any, secret: bytes, purpose: str) -> None:
    """Before `bind`. purpose: different for each use of a secret. Raises UserError where ZeroMQ cannot encrypt."""
    private = _private(secret, purpose)
    socket.curve_secretkey, socket.curve_publickey = private, zmq.curve_public(private)
    socket.curve_server = True


def encrypt_client(socket: zmq.Socket[Any] | Any, secret: bytes, purpose: str) -> None:
    """Before `connect`. Raises as `encrypt_server`."""
    socket.curve_serverkey = zmq.curve_public(_private(secret, purpose))
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()


def _private(secret: bytes, purpose: str) -> bytes:
    if not zmq.has("curve"):
        raise UserError(
            "this build of ZeroMQ has no CURVE encryption, which messages between nodes need: install pyzmq from its "
            "wheel (pip install --force-reinstall --only-binary pyzmq pyzmq)"
        )
    return z85.encode(hashlib.sha256(b"|".join((b"collab_megatron", purpose.encode(), secret))).digest())


def watch_refusals(socket: zmq.Socket[Any] | Any) -> zmq.Socket[Any] | Any:
    """After `encrypt_server`: a socket of the same kind that receives one message for each connection that failed the
    handshake. Receive them soon: when some thousand wait, `socket` waits too. Close it before the context."""
    place = f"inproc://refusals-{secrets.token_hex(8)}"
    socket.monitor(place, _FAILED)
    refusals = socket.context.socket(zmq.PAIR)
    refusals.linger = 0
    refusals.connect(place)
    return refusals
