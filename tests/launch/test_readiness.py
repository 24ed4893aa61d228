"""A server is asked without waiting for it: one that listens and says nothing costs the asker no time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from collab_megatron.launch import readiness
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.readiness import ReadinessProbe


class Listener:
    """Accepts connections; answers when it is told to."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/engine"
        self.asked: list[tuple[socket.socket, str]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.asked.append((connection, connection.recv(1000).decode()))

    def answer(self, said: bytes) -> None:
        """To the latest question."""
        self.asked[-1][0].sendall(said)
        self.asked[-1][0].close()

    def close(self) -> None:
        self._socket.close()
        for connection, _ in self.asked:
            connection.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.close()


def ask_until(ready: ReadinessProbe, listener: Listener, questions: int) -> None:
    deadline = time.monotonic() + 5
    while len(listener.asked) < questions:
        assert not ready.answers()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answer_of(ready: ReadinessProbe, within_s: float = 1.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if ready.answers():
            return True
        time.sleep(0.005)
    return False


def test_silence_is_waited_for_without_standing_still(listener: Listener) -> None:
    ready = ReadinessProbe(listener.url, every_s=0.05)
    begin = time.monotonic()
    ask_until(ready, listener, 1)
    polls = [ready.answers() for _ in range(200)]
    assert time.monotonic() - begin < 2
    assert not any(polls)
    assert len(listener.asked) == 1  # it is not asked again meanwhile
    assert listener.asked[0][1].startswith("GET /engine/health HTTP/1.1\r\n")
    listener.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert answer_of(ready)


@pytest.mark.parametrize("said", [b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", b"", b"nonsense\r\n\r\n"])
def test_any_other_answer_is_a_no_and_it_is_asked_again(listener: Listener, said: bytes) -> None:
    ready = ReadinessProbe(listener.url, every_s=0.05)
    ask_until(ready, listener, 1)
    listener.answer(said)
    ask_until(ready, listener, 2)
    ready.close()


def test_a_question_that_nobody_answers_is_given_up(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "ANSWER_S", 0.1)
    ready = ReadinessProbe(listener.url, every_s=0.01)
    ask_until(ready, listener, 3)
    ready.close()


def test_nobody_there_is_a_no() -> None:
    ready = ReadinessProbe(f"http://127.0.0.1:{free_port()}", every_s=0.0)
    assert not any(ready.answers() for _ in range(20))
