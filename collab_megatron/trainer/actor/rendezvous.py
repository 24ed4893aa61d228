"""Stores through which ranks find each other, listening on the one interface that is needed.

torch's TCPStore binds to all interfaces, whatever its host name says, and takes orders from anybody. Given a socket
that listens already it uses that one.
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
    """The store's server, on the interface of the address `host` alone; `port` 0: a free one, see `.port`. With
    `wait_for_workers` it returns once all `world_size` users are connected. Raises OSError where the address cannot be
    had. A host's name may mean another interface to others than to itself: there torch's server listens on all."""
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


def local_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The store of ranks that are all on this node, as MASTER_ADDR says; None where they are not, or where the agent of
    torchrun has the store: torch then meets as it always does. Raises OSError and what TCPStore raises."""
    host = os.environ.get("MASTER_ADDR", "")
    if world_size == 1:
        return dist.HashStore()  # nobody to meet, no port to fight over
    if not _is_loopback(host) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
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


def _is_loopback(host: str) -> bool:
    return _is_address(host) and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
