"""Asks a server's /health over and over without ever waiting for the answer.

SGLang takes a second and more over /health, because it generates a token; the launcher must not stand still for that.
"""

from __future__ import annotations

import http.client
import select
import time
from urllib.parse import urlsplit

CONNECT_S = 0.5  # the one thing that is waited for; at once on this machine
ANSWER_S = 25.0  # then it is asked anew; SGLang itself gives up after 20


class ReadinessProbe:
    """One server's. Call `answers` often, `close` when it is of no use any more."""

    def __init__(self, url: str, *, every_s: float) -> None:
        """At most one question every `every_s` seconds."""
        self._address = urlsplit(url)
        self._every_s = every_s
        self._asked = -every_s
        self._connection: http.client.HTTPConnection | None = None

    def answers(self) -> bool:
        """Whether the answer to an earlier question has come, and is yes."""
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
        except (OSError, http.client.HTTPException):  # it broke off
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
        except OSError:  # nobody listens yet
            connection.close()
        else:
            self._connection = connection
