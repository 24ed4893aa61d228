"""Rendezvous stores of the ranks that listen only on the interface that is needed.

torch's TCPStore binds to all interfaces, whatever its host name, and has no authentication. If it is given a listening
socket, it uses that one.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

import torch.distributed as dist


def listening_store(
    host: str, port: int, *, timeout: timedelta, world_size: int | None = None, wait_for_workers: bool = False
) -> dist.TCPStore:
    """The store's server, listening only on the interface of the address `host`. port: 0 for a free one, see `.port`.
    wait_for_workers: return once all `world_size` ranks are connected. Raises OSError if the address cannot be used.
    A host name may resolve to another interface on other machines: for a name torch's server listens on all."""
    descriptor = None
    if _is_address(host):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            port = listener.getsockname()[1]
            descriptor = listener.detach()  # the store closes it
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=wait_for_workers,
        master_listen_fd=descriptor,
    )


def ranks_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The store of all ranks, at the address MASTER_ADDR. None if that is a host name, or if torchrun's agent has the
    store: then torch uses its own rendezvous. Raises OSError and the errors of TCPStore."""
    host = os.environ.get("MASTER_ADDR", "")
    if world_size == 1:
        return dist.HashStore()  # no other rank, so no port is needed
    if not _is_address(host) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    if rank == 0:
        return listening_store(host, port, timeout=timeout, world_size=world_size, wait_for_workers=True)
    return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return True
