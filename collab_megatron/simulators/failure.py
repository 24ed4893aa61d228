"""What can go wrong with an LLM call, and which of it is worth another attempt. Pure."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping
from dataclasses import dataclass

from collab_megatron.errors import RunError

FATAL_STATUSES = frozenset({400, 401, 402, 403, 404, 405, 413, 415, 422})
"""Asking again cannot help: a wrong key, model, address or request."""

EXPLAINED_STATUSES = frozenset({400, 404, 422})
"""The provider's own words help to mend these; those of 401 and 403 may quote the key, so they are left out."""

DETAIL_CHARS = 200


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

    def __str__(self) -> str:
        status = f" (status {self.status})" if self.status is not None else ""
        return f"{self.kind}{status}" + (f": {self.detail}" if self.detail else "")


def classify(error: BaseException, secret: str | None) -> Failure:
    """Read an API client's exception; `secret` is cut out of whatever text is kept."""
    status = getattr(error, "status_code", None)
    status = status if isinstance(status, int) else None
    text = str(error)
    # A spent account answers 429 like a busy one, but no waiting fills it.
    fatal = status in FATAL_STATUSES or (status == 429 and "insufficient_quota" in text)
    detail = ""
    if status in EXPLAINED_STATUSES:
        detail = " ".join(text.split())
        detail = (detail.replace(secret, "***") if secret else detail)[:DETAIL_CHARS]
    return Failure(type(error).__name__, status, fatal, retry_after_s(_headers(error), time.time()), detail)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that `Retry-After` (a number or a date; `retry-after-ms` too) asks to wait; None if it does not."""
    lower = {name.lower(): value for name, value in headers.items()}
    try:
        if "retry-after-ms" in lower:
            return max(0.0, float(lower["retry-after-ms"]) / 1000)
        value = lower.get("retry-after")
        if value is None:
            return None
        if value.replace(".", "", 1).strip().isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now)
    except ValueError:
        return None  # a header that nobody can read asks for nothing


def _headers(error: BaseException) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    for headers in (getattr(error, "litellm_response_headers", None), getattr(response, "headers", None)):
        if headers:
            return {str(name): str(value) for name, value in headers.items()}
    return {}
