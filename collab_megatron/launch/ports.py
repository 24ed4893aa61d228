"""Free TCP ports and addresses of this machine.

python -m collab_megatron.launch.ports NODE      an address of this machine that NODE can reach, and a free port
"""

from __future__ import annotations

import random
import socket
import sys
from pathlib import Path

import psutil

from collab_megatron.errors import RunError, UserError, run_cli

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


def address_towards(host: str) -> str:
    """The address of this machine on the way to `host`. Raises OSError if there is none. Sends nothing."""
    family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has this address. Raises RunError if none has."""
    for name, known in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in known):
            return name
    raise RunError(f"no network interface of this machine has the address {address}")


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


def main() -> None:
    (node,) = sys.argv[1:]
    try:
        address = address_towards(node)
    except OSError as error:
        raise UserError(f"no way from this machine to {node}: {error.strerror}") from None
    print(f"{address}:{free_port(address)}")


if __name__ == "__main__":
    run_cli(main)
