"""tests/forks.py: what a starter may do in the middle of a question."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.forks import ForkServer


class Interrupted:
    """A socket: a signal's exception comes once, after a question was sent and before its answer is read."""

    def __init__(self, real: Any) -> None:
        self._real, self._left = real, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recv(self, size: int) -> bytes:
        if self._left:
            self._left = 0
            raise KeyboardInterrupt
        return bytes(self._real.recv(size))


def test_an_answer_that_was_not_read_is_asked_for_again(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text("raise SystemExit(3)")
    server = ForkServer(["json"])
    process = server.start(script, [], os.environ, tmp_path / "output")
    time.sleep(1.0)  # it has ended: the answer that is lost is its exit code
    connection: Any = server.warm()
    connection._socket = Interrupted(connection._socket)
    with pytest.raises(KeyboardInterrupt):
        process.poll()
    assert process.wait(30) == 3
    other = server.start(script, [], os.environ, tmp_path / "output")
    assert other.pid != process.pid
    assert other.wait(30) == 3
