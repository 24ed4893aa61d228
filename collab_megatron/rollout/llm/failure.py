"""Failures of an LLM call: what went wrong, whether another attempt can help, and which counter it goes to. Pure."""

from __future__ import annotations

import email.utils
import errno
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from collab_megatron.errors import RunError, masked
from collab_megatron.text import whole_text

FATAL_STATUSES = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422})
"""Another attempt there cannot help: wrong key, model, address or request."""

EXPLAINED_STATUSES = frozenset({400, 404, 422})
"""The provider's words help to fix these. Those of 401 and 403 may quote the key and are left out."""

REQUEST_STATUSES = frozenset({400, 413, 415, 422})
"""The fault is in the request, not in the deployment: other requests may go there."""

OVERLOAD_STATUSES = frozenset({429, 503, 529})

NOBODY_ANSWERED = frozenset({"timeouts", "connection_errors"})
"""Counters of attempts without an answer: LiteLLM makes up a class and a status for them."""

UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
NOT_HTTP = frozenset({"BadStatusLine", "BadHttpMessage"})
DETAIL_CHARS = 200
LONGEST_CHAIN = 16  # causes of an exception that are examined
PROVIDER = "the provider"  # if its address is not known


class SimulatorError(RunError):
    """A simulated user or judge gave no usable reply."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt."""

    kind: str  # class name of the error, or "MalformedReply"
    status: int | None = None  # HTTP status, if there was one
    fatal: bool = False  # another attempt there cannot help
    retry_after_s: float | None = None  # what the server asked for
    detail: str = ""  # the provider's words, shortened, without the key; what happened to a broken connection
    counter: str = ""  # the field of RoleUsage that counts it

    @property
    def overload(self) -> bool:
        """Whether the server is overloaded. Status 429 for a spent account does not count."""
        return self.status in OVERLOAD_STATUSES and not self.fatal

    @property
    def cools_down(self) -> bool:
        """Whether the deployment should cool down."""
        return self.status not in REQUEST_STATUSES

    def __str__(self) -> str:
        if self.counter in NOBODY_ANSWERED:
            return self.detail
        status = f" (status {self.status})" if self.status is not None else ""
        return f"{self.kind}{status}" + (f": {self.detail}" if self.detail else "")


def timed_out(timeout_s: float, address: str = "") -> Failure:
    """No complete answer from `address` (HOST:PORT) before the attempt's deadline."""
    detail = f"no answer from {address or PROVIDER} within {timeout_s:.1f} s (Timeout)"
    return Failure("Timeout", detail=detail, counter="timeouts")


def classify(error: BaseException, secrets: Iterable[str], address: str = "") -> Failure:
    """The failure behind an exception of the API client, without the `secrets` in its text.

    `address` is the server's HOST:PORT; empty: the provider's own.
    """
    status = getattr(error, "status_code", None)
    status = status if isinstance(status, int) else None
    counter = _counter(error, status)
    if counter in NOBODY_ANSWERED:
        links = list(_chain(error))
        return Failure(type(links[-1]).__name__, detail=_what_broke(links, counter, address), counter=counter)
    text = str(error)
    # A spent account answers 429 like a busy server, but waiting does not help.
    fatal = status in FATAL_STATUSES or (status == 429 and "insufficient_quota" in text)
    detail = ""
    if status in EXPLAINED_STATUSES:
        detail = masked(" ".join(text.split())[:4096])  # before the last cut: half an address is not recognized
        for secret in secrets:
            detail = detail.replace(secret, "***")
        detail = whole_text(detail[:DETAIL_CHARS])
    asked_s = retry_after_s(_headers(error), time.time())
    return Failure(type(error).__name__, status, fatal, asked_s, detail, counter)


def address_of(api_base: str | None) -> str:
    """HOST:PORT of a URL, for messages: never a user name, password or path. Empty without a URL."""
    try:
        parts = urlsplit(api_base or "")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:  # the port is not a number
        return ""
    return _host_and_port(parts.hostname, port) if parts.hostname else ""


def why_not_connected(error: BaseException, address: str) -> str:
    """Why there is no connection to `address` (HOST:PORT), in plain words."""
    if isinstance(error, TimeoutError):
        return f"no connection to {address} in time"
    return _what_broke([error], "connection_errors", address)


def _host_and_port(host: object, port: object) -> str:
    name = f"[{host}]" if ":" in str(host) else str(host)
    return name if port is None else f"{name}:{port}"


def _what_broke(links: Sequence[BaseException], counter: str, address: str) -> str:
    """What happened to the connection, in plain words, from an exception and its causes.

    Only the operating system's words are quoted: the client's contain whole URLs.
    """
    classes = _classes(links)
    for link in links:  # the exception of the connect has the address; through a proxy it is another one
        if getattr(link, "host", None) and hasattr(link, "port"):
            address = _host_and_port(link.host, link.port)  # type: ignore[attr-defined]
    where = address or PROVIDER
    number, system_words = next(
        ((link.errno, link.strerror) for link in reversed(links) if isinstance(link, OSError) and link.errno), (0, "")
    )
    if counter == "timeouts":
        connecting = classes & {"ConnectTimeout", "ConnectionTimeoutError", "PoolTimeout"}
        return f"no {'connection to' if connecting else 'answer from'} {where} in time (Timeout)"
    if classes & {"gaierror", "ClientConnectorDNSError"}:
        host = where.rpartition(":")[0] or where
        return f"no address found for {host} (DNS: {system_words or 'no answer'})"
    if classes & {"SSLError", "ClientSSLError", "CertificateError"}:
        named = (getattr(link, name, None) for link in reversed(links) for name in ("verify_message", "reason"))
        why = next(filter(None, named), "no reason is given")
        return f"no TLS connection to {where} ({str(why).replace('_', ' ').lower()})"
    if number == errno.ECONNREFUSED:
        return f"connection refused by {where}"
    if number in UNREACHABLE:
        return f"{where} cannot be reached ({os.strerror(number)})"
    if "ClientHttpProxyError" in classes:
        return f"the HTTP proxy refused the connection to {where}"
    if classes & NOT_HTTP:
        return f"{where} did not answer in HTTP"
    return f"connection broken by {where} ({type(links[-1]).__name__})"


def _classes(links: Iterable[BaseException]) -> set[str]:
    """Class names: the HTTP client's classes are known by name, so that this file imports no client."""
    return {kind.__name__ for link in links for kind in type(link).__mro__}


def _counter(error: BaseException, status: int | None) -> str:
    """The counter of a failure. LiteLLM sets a status of its own, mostly 500; the chain of causes has the real one."""
    classes = _classes(_chain(error))
    if "HTTPStatusError" not in classes:
        if classes & {"TimeoutException", "TimeoutError"}:
            return "timeouts"
        if classes & {"TransportError", "OSError", "ClientError"}:
            return "connection_errors"
        if status in (None, 200, 500):
            return "bad_bodies"  # an answer with status 200 that the client could not read
    if status == 429:
        return "rate_limited"
    return "rejected" if status is not None and status < 500 else "server_errors"


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(LONGEST_CHAIN):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by `Retry-After` (a number or a date) or `retry-after-ms`; None without such a header."""
    lower = {name.lower(): value for name, value in headers.items()}
    value = lower.get("retry-after")
    try:
        if "retry-after-ms" in lower:
            asked_s = float(lower["retry-after-ms"]) / 1000
        elif value is None:
            return None
        elif value.replace(".", "", 1).strip().isdigit():
            asked_s = float(value)
        else:
            asked_s = email.utils.parsedate_to_datetime(value).timestamp() - now
    except (ValueError, OverflowError):
        return None  # an unreadable header asks for nothing
    return max(0.0, asked_s) if math.isfinite(asked_s) else None


def _headers(error: BaseException) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    for headers in (getattr(error, "litellm_response_headers", None), getattr(response, "headers", None)):
        if headers:
            return {str(name): str(value) for name, value in headers.items()}
    return {}
