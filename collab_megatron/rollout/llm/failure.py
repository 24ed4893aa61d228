"""What can go wrong with an LLM call, which of it is worth another attempt, and as what it is counted. Pure."""

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
"""Asking again there cannot help: a wrong key, model, address or request."""

EXPLAINED_STATUSES = frozenset({400, 404, 422})
"""The provider's own words help to mend these; those of 401 and 403 may quote the key, so they are left out."""

REQUEST_STATUSES = frozenset({400, 413, 415, 422})
"""They speak of this request, not of the deployment: others may go on there."""

OVERLOAD_STATUSES = frozenset({429, 503, 529})

NOBODY_ANSWERED = frozenset({"timeouts", "connection_errors"})
"""Counters of what no server answered: the client's class and status for it are inventions."""

UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN})
NOT_HTTP = frozenset({"BadStatusLine", "BadHttpMessage"})
DETAIL_CHARS = 200
LONGEST_CHAIN = 16  # causes of an exception that are looked at
PROVIDER = "the provider"  # where the address is not known


class SimulatorError(RunError):
    """A simulated user or judge gave no usable reply."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt."""

    kind: str  # class name of the error, or "MalformedReply"
    status: int | None = None  # HTTP status, if there was one
    fatal: bool = False  # another attempt there cannot help
    retry_after_s: float | None = None  # what the server asked for
    detail: str = ""  # the provider's words, shortened, without the key; of a broken connection, what happened to it
    counter: str = ""  # the field of RoleUsage that counts it

    @property
    def overload(self) -> bool:
        """The server says that it has too much to do. A spent account says so too, and is not meant."""
        return self.status in OVERLOAD_STATUSES and not self.fatal

    @property
    def ill(self) -> bool:
        """Whether the deployment is to be left alone for a while."""
        return self.status not in REQUEST_STATUSES

    def __str__(self) -> str:
        if self.counter in NOBODY_ANSWERED:
            return self.detail
        status = f" (status {self.status})" if self.status is not None else ""
        return f"{self.kind}{status}" + (f": {self.detail}" if self.detail else "")


def timed_out(timeout_s: float, address: str = "") -> Failure:
    """No whole answer of `address` (HOST:PORT) within the attempt's own deadline."""
    detail = f"no answer from {address or PROVIDER} within {timeout_s:.1f} s (Timeout)"
    return Failure("Timeout", detail=detail, counter="timeouts")


def classify(error: BaseException, secrets: Iterable[str], address: str = "") -> Failure:
    """Read an API client's exception about a request to `address` (HOST:PORT; empty: the provider's own). The secrets
    are cut out of whatever text is kept."""
    status = getattr(error, "status_code", None)
    status = status if isinstance(status, int) else None
    counter = _counter(error, status)
    if counter in NOBODY_ANSWERED:
        links = list(_chain(error))
        return Failure(type(links[-1]).__name__, detail=_what_broke(links, counter, address), counter=counter)
    text = str(error)
    # A spent account answers 429 like a busy one, but no waiting fills it.
    fatal = status in FATAL_STATUSES or (status == 429 and "insufficient_quota" in text)
    detail = ""
    if status in EXPLAINED_STATUSES:
        detail = masked(" ".join(text.split())[:4096])  # before the last cut: half an address is not known as one
        for secret in secrets:
            detail = detail.replace(secret, "***")
        detail = whole_text(detail[:DETAIL_CHARS])
    asked_s = retry_after_s(_headers(error), time.time())
    return Failure(type(error).__name__, status, fatal, asked_s, detail, counter)


def address_of(api_base: str | None) -> str:
    """HOST:PORT of a URL, for messages: never a user name, password or path. Empty where there is no URL."""
    try:
        parts = urlsplit(api_base or "")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:  # a port that is no number
        return ""
    return _host_and_port(parts.hostname, port) if parts.hostname else ""


def why_not_connected(error: BaseException, address: str) -> str:
    """In plain words, why there is no connection to `address` (HOST:PORT)."""
    if isinstance(error, TimeoutError):
        return f"no connection to {address} in time"
    return _what_broke([error], "connection_errors", address)


def _host_and_port(host: object, port: object) -> str:
    name = f"[{host}]" if ":" in str(host) else str(host)
    return name if port is None else f"{name}:{port}"


def _what_broke(links: Sequence[BaseException], counter: str, address: str) -> str:
    """The connection's failure in plain words, of an exception and its causes. Only the system's own words are quoted:
    the client's hold whole URLs."""
    classes = _classes(links)
    for link in links:  # the one that tried to connect knows where; through a proxy that is another place
        if getattr(link, "host", None) and hasattr(link, "port"):
            address = _host_and_port(link.host, link.port)  # type: ignore[attr-defined]
    where = address or PROVIDER
    number, said = next(
        ((link.errno, link.strerror) for link in reversed(links) if isinstance(link, OSError) and link.errno), (0, "")
    )
    if counter == "timeouts":
        connecting = classes & {"ConnectTimeout", "ConnectionTimeoutError", "PoolTimeout"}
        return f"no {'connection to' if connecting else 'answer from'} {where} in time (Timeout)"
    if classes & {"gaierror", "ClientConnectorDNSError"}:
        host = where.rpartition(":")[0] or where
        return f"no address is known for {host} (DNS: {said or 'no answer'})"
    if classes & {"SSLError", "ClientSSLError", "CertificateError"}:
        named = (getattr(link, name, None) for link in reversed(links) for name in ("verify_message", "reason"))
        why = next(filter(None, named), "no reason is given")
        return f"no TLS connection with {where} ({str(why).replace('_', ' ').lower()})"
    if number == errno.ECONNREFUSED:
        return f"connection refused by {where}"
    if number in UNREACHABLE:
        return f"{where} cannot be reached ({os.strerror(number)})"
    if "ClientHttpProxyError" in classes:
        return f"the HTTP proxy gives no connection to {where}"
    if classes & NOT_HTTP:
        return f"{where} answers with something else than HTTP"
    return f"connection broken by {where} ({type(links[-1]).__name__})"


def _classes(links: Iterable[BaseException]) -> set[str]:
    """The HTTP client's classes are known by name here, so that reading a failure imports no client."""
    return {kind.__name__ for link in links for kind in type(link).__mro__}


def _counter(error: BaseException, status: int | None) -> str:
    """LiteLLM gives a status of its own to whatever went wrong, mostly 500; the chain of causes says what it was."""
    classes = _classes(_chain(error))
    if "HTTPStatusError" not in classes:
        if classes & {"TimeoutException", "TimeoutError"}:
            return "timeouts"
        if classes & {"TransportError", "OSError", "ClientError"}:
            return "connection_errors"
        if status in (None, 200, 500):
            return "bad_bodies"  # an answer came with status 200, and the client could make nothing of it
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
    """Seconds that `Retry-After` (a number or a date; `retry-after-ms` too) asks to wait; None if it does not."""
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
        return None  # a header that nobody can read asks for nothing
    return max(0.0, asked_s) if math.isfinite(asked_s) else None


def _headers(error: BaseException) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    for headers in (getattr(error, "litellm_response_headers", None), getattr(response, "headers", None)):
        if headers:
            return {str(name): str(value) for name, value in headers.items()}
    return {}
