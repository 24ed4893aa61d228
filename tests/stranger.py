"""Another user of the node, for real: a process with the uid of `nobody` that tries what it is told.

    as_stranger([{"read": "/proc/4711/environ"}, {"http": ["GET", "http://127.0.0.1:30000/model_info"]}])
    -> ["EACCES", "401"]

Only root can become another user; elsewhere such tests are skipped with the reason.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import zmq

NOBODY = 65534
DONE = "done"  # the attempt had its effect
SECONDS = 10.0

only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")


def as_stranger(attempts: Sequence[dict[str, Any]], timeout_s: float = 120.0) -> list[str]:
    """What came of each attempt: DONE, the name of an errno, a status of HTTP, or `silence`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.stranger"],
        cwd=Path(__file__).resolve().parents[1],
        input=json.dumps(list(attempts)),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert len(results) == len(attempts)
    return list(results)


def _read(path: str) -> str:
    with open(path, "rb") as file:
        file.read(4096)
    return DONE


def _list(path: str) -> str:
    os.listdir(path)
    return DONE


def _write(path: str) -> str:
    os.close(os.open(path, os.O_WRONLY | (os.O_CREAT if not os.path.exists(path) else 0)))
    return DONE


def _unix(path: str) -> str:
    """A leading @ stands for an abstract address."""
    with socket.socket(socket.AF_UNIX) as one:
        one.connect("\0" + path[1:] if path.startswith("@") else path)
    return DONE


def _kill(pid: int) -> str:
    os.kill(pid, signal.SIGTERM)
    return DONE


def _http(method: str, url: str, headers: dict[str, str] | None = None) -> str:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=SECONDS)
    try:
        connection.request(method, parts.path or "/", headers=headers or {})
        return str(connection.getresponse().status)
    finally:
        connection.close()


def _zmq(address: str, frames: list[str], times: int = 1) -> str:
    """Frames as hexadecimal digits, without a handshake."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as one:
        one.linger = 0
        one.sndtimeo = 500  # nothing can be sent before the handshake
        one.connect(address)
        for _ in range(times):
            try:
                one.send_multipart([bytes.fromhex(frame) for frame in frames])
            except zmq.Again:
                break
        return DONE if one.poll(500) else "silence"


KINDS: dict[str, Any] = {
    "read": _read,
    "list": _list,
    "write": _write,
    "unix": _unix,
    "kill": _kill,
    "http": _http,
    "zmq": _zmq,
}


def _outcome(attempt: dict[str, Any]) -> str:
    ((kind, given),) = attempt.items()
    try:
        return str(KINDS[kind](*given) if isinstance(given, list) else KINDS[kind](given))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


def main() -> None:
    attempts = json.load(sys.stdin)
    # nothing is imported from here on: the stranger may not be able to read the interpreter's files
    "localhost".encode("idna")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    print(json.dumps([_outcome(attempt) for attempt in attempts]))


if __name__ == "__main__":
    main()
