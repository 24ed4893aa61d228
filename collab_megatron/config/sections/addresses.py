"""Syntax of host names and http URLs. No DNS lookups."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

# RFC 1123, with the underscore of container names; IPv4 addresses match too
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LONGEST = 253  # characters of a host name
DEFAULT_PORTS = {"http": 80, "https": 443}


def check_host(host: str) -> str:
    """`host`, if it is a host name or an IPv4 address. Raises ValueError."""
    if len(host) > _LONGEST or any(len(label) > 63 for label in host.split(".")):
        raise ValueError("it is too long for a host name: name this machine's address, such as 127.0.0.1")
    if not is_host(host):
        raise ValueError(
            f"{host!r} is neither a host name nor an IPv4 address: name this machine's address, such as 127.0.0.1; "
            "the port is engine.port"
        )
    return host


def is_host(host: str) -> bool:
    return len(host) <= _LONGEST and all(map(_LABEL.fullmatch, host.removesuffix(".").split(".")))


def host_and_port(url: str) -> tuple[str, int] | None:
    """Host and port of an http or https URL (default: the scheme's port); None for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # an invalid port, an unclosed bracket
        return None
    if parts.scheme not in DEFAULT_PORTS or port == 0 or not (is_host(host) or ":" in host):  # or IPv6, in brackets
        return None
    return host, DEFAULT_PORTS[parts.scheme] if port is None else port
