"""What no server answered is called what it was, by a real client at real sockets; never "status 500"."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from collab_megatron.rollout.llm import RoleUsage, SimulatorError
from collab_megatron.rollout.llm.failure import address_of, classify
from collab_megatron.rollout.llm.role_client import RoleClient
from tests.rollout.llm.calls import HELLO, config_for, use_role


@contextmanager
def listening(how: str) -> Iterator[str]:
    """HOST:PORT of a listener that treats every connection in one way: junk | reset | hang."""
    server = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return  # closed
            kept.append(peer)
            if how != "hang":
                peer.recv(65536)
            if how == "junk":
                peer.sendall(b"welcome\r\n\r\n")
            if how == "reset":
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                peer.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield "{}:{}".format(*server.getsockname())
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(10)
    for peer in kept:
        peer.close()


def failing(url: str, **settings: Any) -> tuple[str, RoleUsage]:
    """What a failed call reports about its last attempt, and the role's counters."""

    async def body(role: RoleClient) -> str:
        with pytest.raises(SimulatorError) as caught:
            await role.complete(HELLO)
        return str(caught.value)

    # far above what a busy machine needs for the client's imports
    patient = {"timeout_s": 60.0, "deadline_s": 60.0, "max_attempts": 1, **settings}
    said, usage = use_role(config_for(url, **patient), body, limit_s=90.0)
    assert "status" not in said
    assert "://" not in said
    return said.partition("; last: ")[2], usage


@pytest.fixture
def nobody() -> Iterator[str]:
    """HOST:PORT of a port that is taken and not listened at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield "{}:{}".format(*taken.getsockname())


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_a_refused_connection(nobody: str, provider: str) -> None:
    said, usage = failing(f"http://{nobody}/v1", provider=provider)
    assert said == f"connection refused by {nobody}"
    assert usage.connection_errors == 1


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def knows_no_such_name(host: Any, *args: Any, **options: Any) -> Any:
        if str(host).endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", knows_no_such_name)
    said, usage = failing("http://llm.invalid:8000/v1")
    assert said == "no address found for llm.invalid (DNS: Name or service not known)"
    assert usage.connection_errors == 1


def test_tls_with_a_server_that_has_none() -> None:
    with listening("junk") as address:
        said, usage = failing(f"https://{address}/v1")
        assert said.startswith(f"no TLS connection to {address} (")
        assert usage.connection_errors == 1


def test_a_connection_that_breaks_and_one_that_is_no_http() -> None:
    with listening("reset") as address:
        assert failing(f"http://{address}/v1")[0].startswith(f"connection broken by {address} (")
    with listening("junk") as address:
        assert failing(f"http://{address}/v1")[0] == f"{address} did not answer in HTTP"


def test_a_server_that_does_not_answer() -> None:
    with listening("hang") as address:
        said, usage = failing(f"http://{address}/v1", timeout_s=0.5)
        # by our own clock or the client's, which runs as long
        assert said in [f"no answer from {address} {when} (Timeout)" for when in ("within 0.5 s", "in time")]
        assert usage.timeouts == 1


def test_a_certificate_that_nobody_signed() -> None:
    class ClientConnectorCertificateError(OSError):
        host, port = "llm.example", 443

    class TransportError(Exception):
        """As httpx names it."""

    wrong = ssl.SSLCertVerificationError(1, "certificate verify failed")
    wrong.verify_message = "self-signed certificate"
    connector = ClientConnectorCertificateError("Cannot connect to https://llm.example/v1?key=secret")
    connector.__cause__ = wrong
    error = TransportError("Connection error.")
    error.__cause__ = connector
    assert str(classify(error, [])) == "no TLS connection to llm.example:443 (self-signed certificate)"


def test_an_address_is_host_and_port_alone() -> None:
    assert address_of("https://me:secret@[::1]/v1?key=x") == "[::1]:443"
    assert address_of("http://llm.example:8000/v1") == "llm.example:8000"
    assert [address_of(base) for base in (None, "", "no URL", "http://x:port/")] == ["", "", "", ""]
