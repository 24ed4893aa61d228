"""Which TCP sockets a process listens on, as the kernel tells it."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

LISTENS = "0A"  # TCP_LISTEN of net/tcp_states.h
ACCEPTS = 0x10000  # __SO_ACCEPTCON of linux/net.h
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def listening(pid: int) -> set[tuple[Address, int]]:
    """(address, port) of every listening socket that the process holds; none of one that has ended."""
    inodes = _sockets(pid)
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS and inode in inodes:
                address, port = local.split(":")
                found.add((_address(address), int(port, 16)))
    return found


def open_to_others(pids: Iterable[int]) -> dict[int, set[tuple[Address, int]]]:
    """Of each process, the listening sockets that another machine could reach; processes without any are left out."""
    found = {}
    for pid in pids:
        reachable = {(address, port) for address, port in listening(pid) if not address.is_loopback}
        if reachable:
            found[pid] = reachable
    return found


def unix_listening(pid: int) -> set[str]:
    """Paths of the Unix sockets that the process listens on; abstract ones begin with @."""
    inodes = _sockets(pid)
    found = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *path = line.split(maxsplit=7)
        if int(flags, 16) & ACCEPTS and inode in inodes and path:
            found.add(path[0])
    return found


def _sockets(pid: int) -> set[str]:
    """Inodes of the sockets that the process holds."""
    inodes = set()
    for file in _entries(Path(f"/proc/{pid}/fd")):
        try:
            target = os.readlink(file)
        except OSError:
            continue  # closed while we looked
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    return inodes


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _address(text: str) -> Address:
    """Of the kernel's words of 32 bits, each in this machine's order of bytes."""
    words = [int(text[at : at + 8], 16).to_bytes(4, "little") for at in range(0, len(text), 8)]
    packed = b"".join(words)
    if len(packed) == 4:
        return ipaddress.IPv4Address(packed)
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address
