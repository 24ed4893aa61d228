"""What can go wrong with an LLM call, which of it is worth another attempt, and as what it is counted. Pure."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from collab_megatron.errors import RunError, masked
from collab_megatron.text import whole_text

FATAL_STATUSES = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422})
"""Asking again there cannot help: a wrong key, model, address or request."""

EXPLAINED_STATUSES = frozenset({400, 404, 422})
"""The provider's own words help to mend these; those of 401 and 403 may quote the key, so they are left out."""

REQUEST_STATUSES = frozenset({400, 413, 415, 422})
"""They speak of this request, not of the deployment: others may go on there."""

OVERLOAD_STATUSES = frozenset({429, 503, 529})

DETAIL_CHARS = 200
LONGEST_CHAIN = 16  # causes of an exception that are looked at


class SimulatorError(RunError):
    """A simulator or judge could not be had. `fatal`: every later call of this role would fail in the same way."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


@dataclass(frozen=True)
class Failure:
    """One failed attempt."""

    kind: str  # class name of the error, or "MalformedReply"
    status: int | None  # HTTP status where there was one
    fatal: bool
    retry_after_s: float | None  # what the server asked for
    detail: str = ""  # the provider's words, shortened, without the key
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
        status = f" (status {self.status})" if self.status is not None else ""
        return f"{self.kind}{status}" + (f": {self.detail}" if self.detail else "")


def timed_out(timeout_s: float) -> Failure:
    """No whole answer within the attempt's own deadline."""
    return Failure("Timeout", None, False, None, f"no answer within {timeout_s:.1f} s", counter="timeouts")


def classify(error: BaseException, secrets: Iterable[str]) -> Failure:
    """Read an API client's exception; the secrets are cut out of whatever text is kept."""
    status = getattr(error, "status_code", None)
    status = status if isinstance(status, int) else None
    text = str(error)
    # A spent account answers 429 like a busy one, but no waiting fills it.
    fatal = status in FATAL_STATUSES or (status == 429 and "insufficient_quota" in text)
    detail = ""
    if status in EXPLAINED_STATUSES:
        detail = masked(" ".join(text.split()))  # before it is cut: half an address is not known as one
        for secret in secrets:
            detail = detail.replace(secret, "***")
        detail = whole_text(detail[:DETAIL_CHARS])
    asked_s = retry_after_s(_headers(error), time.time())
    return Failure(type(error).__name__, status, fatal, asked_s, detail, _counter(error, status))


def _counter(error: BaseException, status: int | None) -> str:
    """LiteLLM gives a status of its own to whatever went wrong, mostly 500; the chain of causes says what it was.

    The HTTP client's classes are known by name here, so that reading a failure imports no client.
    """
    classes = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
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
