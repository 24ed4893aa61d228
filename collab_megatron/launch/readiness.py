"""Readiness probe: requests a server's /health repeatedly and never blocks on the answer.

SGLang takes a second or more for /health, because it generates a token; the launcher must keep polling meanwhile.
"""

from __future__ import annotations

import http.client
import select
import time
from typing import Protocol
from urllib.parse import urlsplit

CONNECT_S = 0.5  # the only wait; on this machine a connection takes no time
ANSWER_S = 25.0  # then the request is sent again; SGLang itself gives up after 20


class Readiness(Protocol):
    """Whether one server answers."""

    @property
    def url(self) -> str:
        """Of the server; of one on another node known once it answers."""
        ...

    def answers(self) -> bool: ...

    def close(self) -> None: ...


class ReadinessProbe:
    """Probe of one server. Call `answers` often, and `close` at the end."""

    def __init__(self, url: str, *, every_s: float) -> None:
        """At most one request every `every_s` seconds."""
        self.url = url
        self._address = urlsplit(url)
        self._every_s = every_s
        self._asked = -every_s
        self._connection: http.client.HTTPConnection | None = None

    def answers(self) -> bool:
        """Whether an earlier request has been answered with OK."""
        if self._connection is None:
            if time.monotonic() - self._asked >= self._every_s:
                self._ask()
            return False
        if not select.select([self._connection.sock], [], [], 0)[0]:
            if time.monotonic() - self._asked > ANSWER_S:
                self.close()
            return False
        try:
            return self._connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):  # the connection broke
            return False
        finally:
            self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self) -> None:
        self._asked = time.monotonic()
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=CONNECT_S)
        try:
            connection.request("GET", f"{self._address.path}/health")
        except OSError:  # the server does not listen yet
            connection.close()
        else:
            self._connection = connection
