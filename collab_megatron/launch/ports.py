"""Free TCP ports of this machine."""

from __future__ import annotations

import random
import socket
from pathlib import Path

from collab_megatron.errors import RunError

FIRST_PORT = 10240
FREE_PORT_TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago.

    It lies outside the kernel's range for outgoing connections: such a connection could take the port before the server
    listens on it.
    """
    for _ in range(FREE_PORT_TRIES):
        port = random.SystemRandom().randrange(FIRST_PORT, max(_first_ephemeral(), FIRST_PORT + 1000))
        if not port_in_use(host, port):
            return port
    raise RunError(f"no free port was found on {host} in {FREE_PORT_TRIES} tries: is it an address of this machine?")


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        return 32768


def port_in_use(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False
