"""Network namespaces in the place of nodes: each has its own address, and 127.0.0.1 leads to none of the others."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Namespace:
    """One node. `link`: the near end of its cable."""

    name: str
    address: str
    link: str

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` on this node."""
        # `ip netns exec` mounts another /sys, without the control groups that slurmd wants
        return ["nsenter", f"--net=/run/netns/{self.name}", *command]

    def cable(self, state: str) -> None:
        """`down` or `up`."""
        _ip("link", "set", self.link, state)


@dataclass(frozen=True)
class Network:
    """The test's own address, and the nodes."""

    address: str
    nodes: tuple[Namespace, ...]


def why_not() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if shutil.which("ip") is None:
        return "no program ip (Debian: iproute2)"
    name = f"cm{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10, check=False)
    if made.returncode != 0:
        return f"no network namespaces: {made.stderr.strip()}"
    _ip("netns", "del", name)
    return None


_networks = itertools.count()


@contextmanager
def network(count: int) -> Iterator[Network]:
    """`count` nodes and this machine on one bridge, with addresses of their own."""
    # new for each network: the kernel removes a namespace's cables some time after the namespace. Names of interfaces
    # have 15 characters
    tag = (os.getpid() + 7919 * next(_networks)) % 100_000
    subnet = f"10.{77 + tag % 100}.{tag % 250}"
    bridge = f"cmbr{tag}"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        nodes = []
        for number in range(count):
            node = Namespace(f"cmns{tag}n{number}", f"{subnet}.{number + 2}", f"cmv{tag}n{number}")
            _ip("netns", "add", node.name)
            stack.callback(_ip, "netns", "del", node.name)  # and the cable with it
            _ip("link", "add", node.link, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", node.link, "master", bridge, "up")
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", node.name, "link", "set", device, "up")
            nodes.append(node)
        yield Network(f"{subnet}.1", tuple(nodes))


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
